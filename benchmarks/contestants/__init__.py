"""Contestants: functions that take a Run, do its messages and return what they measured."""
