"""A WordNet of one synset, in WordNet's own files, so that METEOR by nltk runs where the real one is not."""

FILES = {
    "lexnames": "00\tnoun.animal\t1\n",
    "data.noun": "00000000 00 n 02 dog 0 hound 0 000 | a domestic animal\n",
    "index.noun": "dog n 1 0 1 0 00000000\nhound n 1 0 1 0 00000000\n",
    "data.adj": "  1 WordNet 3.0 Copyright 2006 by Princeton University.\n",
}
NAMES = ("cntlist.rev", "lexnames", "index.sense") + tuple(
    name for part in ("adj", "adv", "noun", "verb") for name in (f"index.{part}", f"data.{part}", f"{part}.exc")
)


def use_wordnet(monkeypatch, folder, files=NAMES):
    """Have nltk look into ``folder`` only, where ``files`` of the tiny WordNet are."""
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    corpus = folder / "corpora" / "wordnet"
    corpus.mkdir(parents=True)
    for name in files:
        (corpus / name).write_text(FILES.get(name, ""))
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    loader = LazyCorpusLoader("wordnet", WordNetCorpusReader, LazyCorpusLoader("omw-1.4", WordNetCorpusReader, None))
    monkeypatch.setattr(nltk.corpus, "wordnet", loader)


def use_none(monkeypatch, folder):
    """Have nltk find no data at all."""
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
