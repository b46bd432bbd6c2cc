"""Files of rows: their encodings and formats, read row by row with errors that name file and line."""
