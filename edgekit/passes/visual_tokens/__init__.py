"""Visual tokens: which tokens of an image a language model reads, one method a file.

These are no compression passes of a recipe (`edgekit.passes.base.Pass`): a pass changes a network once, before it is
exported, while these choose activations anew for each image. They share the folder because both remove what a model
does not need. `methods.py` lists them; `runtimes/vlm/` applies them to models."""
