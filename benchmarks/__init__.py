"""Makes this a regular package: otherwise an installed one of the same name would be imported in its place."""
