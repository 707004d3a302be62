"""Build a CytoSyn-class model from tiles: autoencoder, encoder, transformer, evaluation, export."""
