"""Texts in, texts out: files of lines, tokens, the text of new tokens, hidden states of texts, and the demo."""
