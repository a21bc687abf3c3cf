"""How the mini preset's four models were made: tokenizer, text encoder, language model and masked autoencoder."""
