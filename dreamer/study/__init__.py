"""The study: statistics, measurements and controls. Imports the core, never the reverse."""
