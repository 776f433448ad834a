"""How good pictures are: features of pictures, and figures computed from them."""
