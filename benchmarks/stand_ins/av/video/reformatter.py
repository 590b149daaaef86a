"""Imported with keye_model; nothing is converted without PyAV."""


class VideoReformatter:
    pass
