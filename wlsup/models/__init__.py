"""The models: pretrained vision encoders, masked autoencoders, text and language models."""
