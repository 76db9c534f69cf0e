"""The built-in vision-language model and the benchmark."""
