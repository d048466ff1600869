"""The operations: where a forward kernel meets its backward. Importing this registers all of them with torch."""
