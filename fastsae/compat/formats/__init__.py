"""One module per file format; each has the same five names, and needs torch and safetensors only.

``NAME``; ``is_coder(path)``, whether one coder of this format lies at ``path``; ``read(path) -> Coder``;
``fit(coder) -> (coder, lost)``, the coder as this format can hold it and a sentence for everything that is lost on
the way; ``write(folder, coders)``, coders by name, with "" for a single one.
"""
