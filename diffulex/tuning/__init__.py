"""Timing the schedules of expert GEMMs on the device at hand, and keeping the times for the plans that follow."""
