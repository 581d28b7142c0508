"""From text files to batches.

corpus.py     which files, their documents and fingerprint;  formats.py  what a file holds;  readers.py  text and tables
tokenizer.py  load or train one, encode, decode; sentencepiece_model.py  a tokenizer.model; special_tokens.py
packing.py    a document's rows, written once as Megatron .bin/.idx;  packed.py  opens and checks them
order.py      which row is sample i of the run
examples.py   prompts with their answers, from tables
prepare.py    the configuration -> packed rows
"""
