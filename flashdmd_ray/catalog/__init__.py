"""Facts about model families and published models, known without loading anything. Imports no torch."""
