"""Schedules that change layers from step to step: each implements ``protocol.LayerSchedule``."""
