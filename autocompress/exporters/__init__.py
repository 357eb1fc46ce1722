"""Exporters: an allocation as a folder that a runtime loads."""
