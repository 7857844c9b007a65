"""The command line: options in, library calls, tables and bars out."""
