"""Week 11. Finding passages and answering from them."""
