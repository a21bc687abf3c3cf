from __future__ import annotations

import codecs
import json

import pytest
from data_makers import noise_jpeg, write_tar

from wlsup.data.sources import SourceRequest, load_source
from wlsup.errors import WlsupError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(noise_jpeg(ord(name)))
    return folder


@pytest.fixture
def read(tmp_path, images):
    def run(content, name="table.csv", max_bad_fraction=0.05, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        request = SourceRequest(str(path), str(images), max_bad_fraction=max_bad_fraction)
        return load_source("table", request, options)

    return run


def pairs(source):
    return dict(zip(source.keys, source.captions, strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'image,caption\na.jpg,"one, two"\nb.jpg,three\n'),
        ("t.csv", 'caption,other,FilePath\n"one, two",x,a.jpg\nthree,y,b.jpg\n'),
        ("t.csv", "image;caption\na.jpg;one, two\nb.jpg;three\n"),
        ("t.csv", "image,caption\r\na.jpg,one, two\r\nb.jpg,three\r\n"),  # an unquoted comma, as in Flickr30k
        ("t.tsv", "title\tfile\none, two\ta.jpg\nthree\tb.jpg\n"),
        ("t.txt", "image| comment_number| comment\na.jpg| 0| one, two\nb.jpg| 0|   three\n"),
        ("t.txt", "filename\ttext\na.jpg\tone, two\nb.jpg\tthree"),
        ("t.jsonl", '{"path": "a.jpg", "sentence": "one, two"}\n\n{"sentence": ["three"], "path": "./b.jpg"}\n'),
        ("t.csv", b"\xef\xbb\xbf" + b'image,caption\na.jpg,"one, two"\nb.jpg,three\n'),
        ("t.csv", codecs.BOM_UTF16_LE + 'image,caption\na.jpg,"one, two"\nb.jpg,three\n'.encode("utf-16-le")),
        ("t.csv", 'image, caption\na.jpg, "one, two"\nb.jpg, three\n'),
        ("t.csv", 'image,caption\na.jpg,"one,\n two"\nb.jpg, three\0\n\n,,\n'),
    ],
)
def test_published_shapes_of_table_are_read_as_they_are(read, name, content):
    assert pairs(read(content, name)) == {"a.jpg": ["one, two"], "b.jpg": ["three"]}


def test_columns_delimiter_and_header_can_be_set(read):
    expected = {"a.jpg": ["one"]}
    assert pairs(read("x#y\na.jpg#one\n", image_column="x", caption_column="Y", delimiter="#")) == expected
    assert pairs(read("one\ta.jpg\n", "t.tsv", header=False, image_column=1, caption_column=0)) == expected
    assert pairs(read("y,x\none,a.jpg\n", image_column=1, caption_column=0)) == expected


def test_a_tsv_takes_quotes_as_they_are_unless_they_wrap_the_field(read):
    source = read('image\tcaption\na.jpg\t"so" he said\nb.jpg\t"a ""big"" dog"\nc.jpg\t"open\nd.jpg\tplain\n', "t.tsv")
    assert pairs(source) == {
        "a.jpg": ['"so" he said'],
        "b.jpg": ['a "big" dog'],
        "c.jpg": ['"open'],
        "d.jpg": ["plain"],
    }


def test_rows_of_one_image_become_one_record_in_file_order(read):
    source = read("image,caption\nb.jpg,1\na.jpg,2\nb.jpg,3\n./b.jpg,4\n")
    assert source.keys == ["a.jpg", "b.jpg"]
    assert source.captions == [["2"], ["1", "3", "4"]]
    assert source.pictures.read(0).shape == (3, 32, 40)


def test_rows_without_caption_or_image_are_left_out_counted_and_named(read):
    source = read('image,caption\na.jpg,one\na.jpg,\nb.jpg,"  "\n,lost\nc.jpg\n', max_bad_fraction=0.9)
    assert pairs(source) == {"a.jpg": ["one"]}
    assert source.dropped == {"b.jpg": "no caption", "c.jpg": "no caption"}
    assert source.notes == [
        "3 rows (lines 3, 4, 6) without a caption left out",
        "1 row (line 5) without an image name left out",
    ]


def test_missing_images_are_dropped_and_named(read):
    source = read("image,caption\na.jpg,one\nz.jpg,two\n../images/a.jpg,three\n")
    assert source.keys == ["a.jpg"]
    assert "not in" in source.dropped["z.jpg"] and "leads out" in source.dropped["../images/a.jpg"]
    assert "2 images listed in table.csv" in source.notes[0] and "z.jpg" in source.notes[0]


def test_a_prefix_missing_from_the_table_is_found_in_the_archive(tmp_path):
    archive = write_tar(tmp_path / "x.tar", {f"top/Images/{name}.jpg": noise_jpeg(1) for name in "abc"})
    (tmp_path / "t.csv").write_text("image,caption\nz.jpg,gone\na.jpg,one\nc.jpg,two\n")
    request = SourceRequest(str(tmp_path / "t.csv"), str(archive))
    source = load_source("table", request)
    assert source.keys == ["a.jpg", "c.jpg"]
    assert list(source.dropped) == ["z.jpg"]
    assert source.pictures.read(1).shape == (3, 32, 40)
    (tmp_path / "t.csv").write_text("image,caption\na,one\n")
    with pytest.raises(WlsupError, match="no usable pair"):
        load_source("table", request, {"image_prefix": ""})
    (tmp_path / "t.csv").write_text("image,caption\nImages/a.jpg,one\n")
    assert load_source("table", request, {"image_prefix": "top/"}).keys == ["Images/a.jpg"]


def test_the_table_s_own_folder_is_the_default_for_images(tmp_path, images):
    (images / "t.csv").write_text("image,caption\na.jpg,one\n")
    assert load_source("table", SourceRequest(str(images / "t.csv"))).keys == ["a.jpg"]


def test_a_few_undecodable_bytes_are_replaced_and_counted_and_many_are_an_error(read):
    rows = "".join(f"a.jpg,caption {i}\n" for i in range(40))
    source = read(f"image,caption\n{rows}".encode() + b"b.jpg,caf\xe9\n")
    assert pairs(source)["b.jpg"] == ["caf\ufffd"]
    assert source.notes == ["1 row (line 42) with bytes that are not utf-8, read as U+FFFD"]
    latin = "image,caption\na.jpg,café\nb.jpg,thé\n".encode("latin-1")
    with pytest.raises(WlsupError, match=r"is not utf-8: 2 of 2 rows .* line 2\. Set --data.source_options\.encoding"):
        read(latin)
    assert pairs(read(latin, encoding="latin-1")) == {"a.jpg": ["café"], "b.jpg": ["thé"]}
    half_a_pair = json.dumps({"image": "a.jpg", "caption": "\ud83d smile"})
    assert pairs(read(half_a_pair, "t.jsonl")) == {"a.jpg": ["\ufffd smile"]}


def test_a_caption_of_ten_thousand_words_is_kept(read):
    caption = "word " * 40_000
    assert len(pairs(read(f'image,caption\na.jpg,"{caption}"\n'))["a.jpg"][0]) == 199_999


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        ("img,words\na.jpg,x\n", "t.csv", {}, r"none of the columns image, .*Found: 'img', 'words'.*image_column"),
        ("image,words\na.jpg,x\n", "t.csv", {}, r"none of the columns caption, .*caption_column"),
        (
            "image,caption\na.jpg,x\n",
            "t.csv",
            {"caption_column": "txt"},
            r"no column 'txt'\. Found: 'image', 'caption'",
        ),
        (
            "image,caption\na.jpg,x\n",
            "t.csv",
            {"column": 1},
            r"Unknown option .*'column'.*image_column, caption_column",
        ),
        ("image,caption\na.jpg,x\n", "t.csv", {"delimiter": "ab"}, r"exactly one character"),
        ("image,caption\na.jpg,x\n", "t.csv", {"encoding": "klingon"}, r"encoding='klingon' is unknown"),
        ("image,caption\n", "t.csv", {}, r"but no rows"),
        ("", "t.csv", {}, r"is empty"),
        ("", "t.jsonl", {}, r"is empty"),
        ('{"image": "a.jpg"}\n{"image": \n', "t.jsonl", {}, r"line 2: not JSON"),
        ("[1]\n", "t.jsonl", {}, r"line 1: a JSON list"),
        ('image,caption\na.jpg,one\nb.jpg,"two\nc.jpg,three\n', "t.csv", {}, r"line 3: a field begins with a quote"),
        ("image,caption\nz.jpg,one\n", "t.csv", {}, r"no usable pair \(not in .*images, such as 'z.jpg'\)"),
    ],
)
def test_a_broken_table_ends_in_one_message_that_says_what_to_do(read, content, name, options, message):
    with pytest.raises(WlsupError, match=message):
        read(content, name, **options)


def test_a_missing_or_wrong_path_is_named(tmp_path):
    with pytest.raises(WlsupError, match=r"No such file: .*absent\.csv"):
        load_source("table", SourceRequest(str(tmp_path / "absent.csv")))
    with pytest.raises(WlsupError, match="is a folder"):
        load_source("table", SourceRequest(str(tmp_path)))
    with pytest.raises(WlsupError, match="needs captions"):
        load_source("table", SourceRequest())


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(WlsupError, match=r"Unknown source 'tabel'. Did you mean 'table'\? Valid: .*mini.*table"):
        load_source("tabel", SourceRequest())


def test_flickr8k_is_read_as_published(shared_data):
    folder = shared_data / "flickr8k_1k"
    source = load_source("table", SourceRequest(str(folder / "captions.txt"), str(folder / "flickr8k_1k_160px.tar")))
    assert len(source.keys) == 1000
    assert {len(captions) for captions in source.captions} == {5}
    assert not source.dropped and not source.notes
    record = pairs(source)["1012212859_01547e3f17.jpg"]
    assert "A dog shakes its head near the shore , a red ball next to it ." in record
    assert source.pictures.read(0).shape[0] == 3


def test_all_captions_of_flickr8k_are_read(shared_data):
    from wlsup.data.tabular import read_table

    table = read_table(shared_data / "flickr8k_1k" / "captions_full_8091_textonly.txt")
    assert len(table.rows) == 40_455
    assert len({row.values[0] for row in table.rows}) == 8_091


def test_cc3m_s_tsv_without_header_is_read(shared_data):
    from wlsup.data.tabular import read_table

    table = read_table(shared_data / "cc3m" / "Validation_GCC-1.1.0-Validation.tsv", header=False)
    assert len(table.rows) == 15_833
    assert all(row.values[1].startswith("http") for row in table.rows)
