"""What there is to fetch, where from, and how it is known to be whole; `skipdit download` is its command."""
