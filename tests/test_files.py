"Files as people have them: each situation gives what is right, or one line that says what to do."
import io
import json
import tarfile

import pandas as pd
import pytest
from PIL import Image

from clip_nbdev.core import UserError
from clip_nbdev.data import open_pairs
from clip_nbdev.files import read_table
from clip_nbdev.labelled import LabelledOptions, open_data


def jpeg(colour="red", kind="JPEG"):
    data = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(data, kind)
    return data.getvalue()


JPG,PNG = jpeg(),jpeg(kind="PNG")


def put(folder, *names, content=JPG):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(content)


def pack(path, *members):
    "A tar of (name, contents); a name alone is an image or a text by its ending."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            name,data = member if isinstance(member, tuple) else (member, JPG if not member.endswith("txt") else b"a wall")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(data, **how):
    "Captions by the image's name, after a pass that opens every image."
    found = open_pairs(str(data), **how)
    rows = [(name.replace("\\", "/").split("/")[-1], open_image().size, captions) for name,open_image,captions in found.samples()]
    assert len(rows) == len(found) and all(size == (12, 10) for _,size,_ in rows)
    return [(name, captions) for name,_,captions in rows],found.notes


def said(data, **how):
    with pytest.raises(UserError) as refused: pairs(data, **how)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def captions(data, **how): return [c for _,c in pairs(data, **how)[0]]


# archives

@pytest.mark.parametrize("stem", ["img_v1.{:03}", "{}.input", "plain_{}", "sub.dir/{}", "a b.c.{}"])
def test_keys_with_dots(tmp_path, stem):
    shard = pack(tmp_path/"a.tar", *(f"{stem.format(i)}.{e}" for i in range(10) for e in ("jpg", "txt")))
    assert captions(shard) == [["a wall"]]*10


def test_half_of_the_keys_have_dots(tmp_path):
    names = [f"scale1.5x_{i}" if i % 2 else f"plain_{i}" for i in range(10)]
    assert captions(pack(tmp_path/"a.tar", *(f"{n}.{e}" for n in names for e in ("jpg", "txt")))) == [["a wall"]]*10


def test_endings_that_only_their_owner_can_name(tmp_path):
    shard = pack(tmp_path/"a.tar", *(f"{i}.{e}" for i in range(3) for e in ("input.jpg", "outputs.txt")))
    message = said(shard)
    assert "0.input.jpg, 0.outputs.txt" in message and "--image-key" in message and "--caption-key" in message
    assert captions(shard, image_key="input.jpg", caption_key="outputs.txt") == [["a wall"]]*3


def test_a_mask_beside_each_image_is_no_sample(tmp_path):
    shard = pack(tmp_path/"a.tar", *(f"{i}.{e}" for i in range(4) for e in ("jpg", "mask.png", "txt")))
    rows,notes = pairs(shard)
    assert [c for _,c in rows] == [["a wall"]]*4 and notes == ["left out: 4 further images of a sample (0.mask.png, …)"]


def test_what_a_mac_adds_is_not_there(tmp_path):
    shard = pack(tmp_path/"a.tar", *(f"./{p}{i}.{e}" for i in range(3) for p in ("._", "") for e in ("jpg", "txt")),
                 "__MACOSX/0.jpg", ".hidden/0.jpg")
    assert pairs(shard) == ([(f"a.tar:{i}", ["a wall"]) for i in range(3)], [])


def test_images_and_texts_apart_are_refused(tmp_path):
    shard = pack(tmp_path/"a.tar", *(f"{i}.jpg" for i in range(5)), *(f"{i}.txt" for i in range(5)))
    assert "--sort=name" in said(shard)


def test_a_count_that_lies_is_not_asked(tmp_path):
    shard = pack(tmp_path/"a.tar", "1.jpg", "1.txt", "2.jpg", "2.txt")
    (tmp_path/"a_stats.json").write_text('{"successes": 7}')
    assert len(open_pairs(str(shard))) == 2


def test_what_is_no_pair_is_counted_by_reason(tmp_path):
    shard = pack(tmp_path/"a.tar", "1.jpg", "1.txt", "2.txt", "3.heic", "3.txt", "4.jpg")
    rows,notes = pairs(shard)
    assert rows == [("a.tar:1", ["a wall"]), ("a.tar:4", [])]
    assert notes == ["left out: 2 texts without an image beside them (2.txt, …)",
                     "left out: 1 .heic files, which Pillow can't read (3.heic)"]


def test_a_folder_of_folders_of_tars(tmp_path):
    for n in "01": pack(tmp_path/"data"/n/f"{n}.tar", f"{n}.jpg", f"{n}.txt")
    assert captions(tmp_path/"data") == [["a wall"]]*2
    for n,label in ("01", "10"): pack(tmp_path/"labelled"/n/f"{n}.tar", f"{n}.jpg", (f"{n}.cls", label.encode()))
    (tmp_path/"names.txt").write_text("cat\ndog\n")
    data = open_data(LabelledOptions(classnames=tmp_path/"names.txt"), str(tmp_path/"labelled"))
    assert [get()[1] for _,get in data.parts["all"]().samples()] == [1, 0]
    put(tmp_path/"data", "9.jpg")
    assert "has images" in said(tmp_path/"data")


@pytest.mark.parametrize("text,meta,right", [
    (b"Sunset over the bay\nfrom our window", dict(caption="Sunset over the bay\nfrom our window"), ["Sunset over the bay from our window"]),
    (b"one\ntwo", dict(caption="three"), ["one", "two"]),
    ("a\u2028b\x85c\x0cd".encode(), None, ["a b c d"])])
def test_captions_end_where_an_editor_ends_them(tmp_path, text, meta, right):
    members = [("1.jpg", JPG), ("1.txt", text)] + ([("1.json", json.dumps(meta).encode())] if meta else [])
    assert captions(pack(tmp_path/"a.tar", *members)) == [right]


# folders

def test_hidden_files_and_other_spellings(tmp_path):
    put(tmp_path, "cat/1.jpg", "cat/.ipynb_checkpoints/1-checkpoint.jpg", "cat/._1.jpg", "dog/2.JFIF", "dog/3.tif", "__MACOSX/cat/1.jpg")
    assert sorted(pairs(tmp_path)[0]) == [("1.jpg", ["a photo of a cat."]), ("2.JFIF", ["a photo of a dog."]), ("3.tif", ["a photo of a dog."])]


def test_the_class_is_the_first_folder(tmp_path):
    put(tmp_path, "dog/images/0.JPEG", "cat/puppies/old/1.jpg", "cat/2.jpg")
    assert pairs(tmp_path)[0] == [("2.jpg", ["a photo of a cat."]), ("1.jpg", ["a photo of a cat."]), ("0.JPEG", ["a photo of a dog."])]
    assert open_data(LabelledOptions(), str(tmp_path)).classnames == ("cat", "dog")


def test_training_takes_the_training_part_and_says_so(tmp_path):
    put(tmp_path, *(f"{part}/{pet}/{i}.jpg" for i,part in enumerate(("train", "val")) for pet in ("golden-retriever", "cat")))
    rows,notes = pairs(tmp_path)
    assert rows == [("0.jpg", ["a photo of a cat."]), ("0.jpg", ["a photo of a golden retriever."])]
    assert notes == [f"training images are those of {tmp_path/'train'}"]


def test_a_single_class_is_refused(tmp_path):
    put(tmp_path, "images/1.jpg", "images/2.jpg")
    assert "one folder with images, 'images'" in said(tmp_path)
    (tmp_path/"captions.txt").write_text("image,caption\n1.jpg,a wall\n")
    assert "captions.txt, if it is a table, as .csv" in said(tmp_path)


def test_a_few_texts_among_class_folders(tmp_path):
    put(tmp_path, *(f"{pet}/{i}.jpg" for pet in ("cat", "dog") for i in range(3)))
    (tmp_path/"cat"/"0.txt").write_text("notes on this one")
    assert "1 of 6 images" in said(tmp_path)
    for i in (1, 2): (tmp_path/"cat"/f"{i}.txt").write_text("a cat")
    assert pairs(tmp_path)[1] == [f"left out: 3 images without a text beside them ({tmp_path}/dog/0.jpg, …)"]


def test_endings_in_capitals(tmp_path):
    put(tmp_path, "A.JPG", "B.JPG")
    (tmp_path/"A.TXT").write_text("a red wall"), (tmp_path/"B.txt").write_text("a blue wall")
    assert captions(tmp_path) == [["a red wall"], ["a blue wall"]]


def test_linked_folders(tmp_path):
    put(tmp_path, "away/1.jpg", "pets/dog/2.jpg")
    (tmp_path/"pets"/"cat").symlink_to(tmp_path/"away")
    (tmp_path/"pets"/"dog"/"up").symlink_to(tmp_path/"pets")
    assert captions(tmp_path/"pets") == [["a photo of a cat."], ["a photo of a dog."]]


@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv", "metadata.jsonl"])
def test_a_table_beside_the_images(tmp_path, name):
    put(tmp_path, "images/1.jpg", "images/2.jpg")
    rows = [dict(file_name=f"images/{i}.jpg", text=f"wall {i}") for i in (1, 2)]
    frame = pd.DataFrame(rows)
    frame.to_json(tmp_path/name, orient="records", lines=True) if name.endswith("jsonl") else frame.to_csv(tmp_path/name, index=False)
    assert captions(tmp_path) == [["wall 1"], ["wall 2"]]
    (tmp_path/"more.csv").write_text("a,b\n1,2\n")
    assert f"several tables ({', '.join(sorted([name, 'more.csv']))})" in said(tmp_path)


def test_a_table_that_names_no_captions_is_refused_by_name(tmp_path):
    put(tmp_path, "images/1.jpg")
    (tmp_path/"labels.csv").write_text("id,breed\n1,dog\n")
    assert "labels.csv has no column 'filepath': it has id, breed" in said(tmp_path)


# names of classes

def test_numbers_are_no_names(tmp_path):
    put(tmp_path, *(f"{n}/1.jpg" for n in range(12)))
    with pytest.raises(UserError, match="are numbers .*--classnames"): open_data(LabelledOptions(), str(tmp_path))
    assert "are numbers" in said(tmp_path)
    names = tmp_path/"names.list"
    names.write_text("\n".join(f"number {i}" for i in range(12)))
    data = open_data(LabelledOptions(classnames=names), str(tmp_path))
    assert {path.parent.name:data.classnames[label] for path,label in data.parts["all"]().items} == {str(i):f"number {i}" for i in range(12)}
    assert ["a photo of a number 10."] in captions(tmp_path, classnames=names)


@pytest.mark.parametrize("labels,words", [(("0.0", "1.0"), "are numbers"), (("n01440764", "n99999999"), "WordNet ids"), (("red|round", "blue"), "several classes")])
def test_labels_of_a_table_that_name_nothing(tmp_path, labels, words):
    (tmp_path/"t.csv").write_text("filepath,label\n" + "".join(f"{i}.jpg,{label}\n" for i,label in enumerate(labels)))
    with pytest.raises(UserError, match=words): open_data(LabelledOptions(), str(tmp_path/"t.csv"))


def test_a_number_with_a_point_is_that_number(tmp_path):
    (tmp_path/"t.csv").write_text("filepath,label\na.jpg,1.0\nb.jpg,0\n")
    (tmp_path/"names.txt").write_text("zero\none\n")
    data = open_data(LabelledOptions(classnames=tmp_path/"names.txt"), str(tmp_path/"t.csv"))
    assert [label for _,label in data.parts["all"]().items] == [1, 0] and data.classnames == ("zero", "one")


# tables

def table(tmp_path, text, name="t.csv", encoding="utf-8"):
    (tmp_path/name).write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    notes = []
    return list(read_table(tmp_path/name, "filepath", "caption", notes).items()),notes


ONE = [("1.jpg", ["a wall"])]


@pytest.mark.parametrize("text,name", [
    ("filepath\ttitle\n1.jpg\ta wall", "tabs.csv"), ("filepath;caption\r\n1.jpg;a wall\r\n", "excel.csv"),
    ("filepath, caption\n1.jpg, a wall", "blanks.csv"), ("filepath,caption\n1.jpg,a wall", "t.CSV"),
    ("sep=;\nfilepath;caption\n1.jpg;a wall", "sep.csv"), ("filepath|caption\n1.jpg|a wall", "pipe.csv"),
    ('"filepath","caption"\n"1.jpg","a wall"', "quoted.csv"), ('"filepath"\t"caption"\n"1.jpg"\t"a wall"', "quoted.tsv"),
    ("image,id,caption\n1.jpg,7,a wall\n\n", "kaggle.csv"), ('{"file_name": "1.jpg", "text": "a wall"}\n', "t.jsonl")])
def test_dialects(tmp_path, text, name): assert table(tmp_path, text, name)[0] == ONE


def test_encodings(tmp_path):
    text = "filepath\tcaption\n1.jpg\ta wäll"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"): assert table(tmp_path, text, "t.tsv", encoding)[0] == [("1.jpg", ["a wäll"])]
    for encoding in ("utf-16-le", "latin-1"):
        with pytest.raises(UserError, match="UTF-8"): table(tmp_path, text, "t.tsv", encoding)


@pytest.mark.parametrize("cell,right", [
    ("nan", []), ("NULL", []), ("", []), ("a,b", ["a,b"]), ("['one', \"two's\"]", ["one", "two's"]), ('["one", "two"]', ["one", "two"]),
    ("[music]", ["[music]"]), ("[]", []), ("two\nlines", ["two lines"]), ('he said "no"', ['he said "no"'])])
def test_cells(tmp_path, cell, right):
    for kind,sep in (("csv", ","), ("tsv", "\t")):
        pd.DataFrame([dict(filepath="1.jpg", caption=cell)]).to_csv(tmp_path/f"x.{kind}", sep=sep, index=False)
        assert table(tmp_path, (tmp_path/f"x.{kind}").read_bytes(), f"x.{kind}")[0] == [("1.jpg", right)]


@pytest.mark.parametrize("text,words", [
    ("filepath,caption\n1.jpg,a red wall, wet\n", "line 2, has 3 cells and the first line 2"),
    ("filepath,caption\n1.jpg,a wall\n2.jpg\n", "line 3, has 1 cells"),
    ("filepath,caption,caption\n1.jpg,a,b\n", "two columns 'caption'"), ("1.jpg,a wall\n2.jpg,a roof\n", "add a first line"),
    ('filepath,caption\n1.jpg,"a wall\n2.jpg,a roof\n', "is no table"), ("filepath,caption\n1.jpg,['a' 'b']\n", "a list without commas")])
def test_tables_that_are_refused(tmp_path, text, words):
    with pytest.raises(UserError) as refused: table(tmp_path, text)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_quotes_in_a_table_with_tabs(tmp_path):
    texts = ["a red wall", '"the end" is what the sign says', '"stop, says the sign', "a cat", '"go" says the sign']
    found,_ = table(tmp_path, "filepath\tcaption\n" + "\n".join(f"{i}.jpg\t{t}" for i,t in enumerate(texts)), "t.tsv")
    assert [t for _,t in found] == [[t] for t in texts]
    with pytest.raises(UserError, match="line 2: the quotes can be"): # Excel writes them around a comma, a person around speech
        table(tmp_path, 'filepath\tcaption\n1.jpg\t"Stop, thief!"\n2.jpg\ta cat\n', "t.tsv")


def test_rows_without_a_path_are_counted(tmp_path):
    found,notes = table(tmp_path, "filepath,caption\n1.jpg,a wall\n,a roof\n")
    assert found == ONE and notes == ["left out: 1 rows of t.csv without a path"]
