"""The flags that are read when a module is imported."""

import enum


class Disposition(enum.IntFlag):
    attached_pic = enum.auto()
    timed_thumbnails = enum.auto()
