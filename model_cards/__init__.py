"""The cards, as package data: `deltanet card` finds its template here in a wheel too."""
