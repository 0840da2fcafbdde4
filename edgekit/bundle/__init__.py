"""The artifact: its format, its packed form, the encodings of weights, the models that come with edgekit."""
