"""Files to Examples: reading with file and line, formats, the check."""
