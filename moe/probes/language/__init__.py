"""In-context language: a random language that stands in the context alone, translated into."""
