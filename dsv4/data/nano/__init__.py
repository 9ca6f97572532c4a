"""Data of the nano model: a corpus's texts, questions about what it defines, haystacks, the tokenizer; as shards."""
