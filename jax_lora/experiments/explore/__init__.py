"""The article's claims, measured: each part gives JSON-able numbers, `pages` writes them up."""
