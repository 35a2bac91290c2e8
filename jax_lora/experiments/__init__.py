"""The article's experiment as a program; imported by the scripts, never by the library."""
