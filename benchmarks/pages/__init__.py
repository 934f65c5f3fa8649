"""The sections of the report, drawn from rows."""
