"""The artifact: its format, its packed form, how weights are encoded, the models that come with edgekit."""
