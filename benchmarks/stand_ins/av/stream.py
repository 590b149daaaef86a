"""As in PyAV."""

Disposition = None
