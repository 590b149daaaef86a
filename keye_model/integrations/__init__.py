"""The model behind other libraries' doors. Nothing here is imported by `keye_model` itself."""
