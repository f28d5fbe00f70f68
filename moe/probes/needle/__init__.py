"""The needle in a haystack: facts hidden in real text, asked for after all of it. Tokens are bytes."""
