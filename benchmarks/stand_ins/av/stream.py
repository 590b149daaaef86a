"""The flags that are read when a module is imported."""

import enum


class Disposition(enum.IntFlag):
    attached_pic = enum.auto()
    timed_thumbnails = enum.auto()
    still_image = enum.auto()
    dependent = enum.auto()
    hearing_impaired = enum.auto()
    visual_impaired = enum.auto()
    default = enum.auto()
