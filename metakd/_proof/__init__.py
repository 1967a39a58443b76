"""The proof on the user's own model that virtual passes compute what real ones do."""
