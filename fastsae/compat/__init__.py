"""fastsae inside other SAE libraries, one module per library; nothing is imported until asked for.

fastsae.compat.convert              coders of every format, read and written
fastsae.compat.sparsify             sparsify's names, for programs that import from sparsify
fastsae.compat.saelens              register(), converters for SAE.load_from_disk and from_pretrained
fastsae.compat.dictionary_learning  dict_class for its trainers
fastsae.compat.saebench             as_saebench(sae, model_name, hook_name)
fastsae.compat.delphi               callables for LatentCache
fastsae.compat.hook_names           Hugging Face module names <-> TransformerLens hook names
"""
