"""How good images are: features of images, and figures computed from them."""
