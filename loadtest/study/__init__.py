"""How every study is run: its flags, its rounds, its rows on disk and its tables."""
