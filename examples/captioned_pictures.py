"""Make a folder of captioned pictures: emoji with their names, from emoji-datasource-google of npm.

    python examples/captioned_pictures.py --out data/emoji
    thalweg fit --config nft/emoji_pretrain.yaml

Every picture gets a text file of its name, with its name and its kind in lower case: "red apple, food fruit".
That is what ``captions: FOLDER`` of ``CaptionDataModule`` reads. ``prompts.txt`` has all of them, one a line.
The package has 74 MB and is refused if it is not the one that the registry states. Its data are under the MIT
licence, the pictures are Noto Emoji of Google, under the Apache licence 2.0 as its README says.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import tarfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from thalweg.diffusion.vocabulary import Vocabulary, words_of

URL = "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
INTEGRITY = "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
"""What https://registry.npmjs.org/emoji-datasource-google/16.0.0 states under ``dist``."""
TABLE = "package/emoji.json"
PICTURES = "package/img/google/64"
GROUPS = ("Animals & Nature", "Food & Drink")
"""Few enough for a small vocabulary; Objects has 264 more, and 8 other groups the rest."""


def checked(package: bytes, integrity: str) -> bytes:
    """A package, if it is the one that is meant.

    Args:
        package: The tarball.
        integrity: Name of a digest, ``-``, and the digest in base64, as npm has it.

    Raises:
        ValueError: If the digest is another one.
    """
    kind = integrity.partition("-")[0]
    found = f"{kind}-{base64.b64encode(hashlib.new(kind, package).digest()).decode()}"
    if found != integrity:
        raise ValueError(f"the package has {found}, needed: {integrity}")
    return package


def contents(package: bytes) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The table of emoji, and the files of the pictures of 64 x 64 pixels by name."""
    table: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if member.name != TABLE and str(path.parent) != PICTURES:
                continue
            file = archive.extractfile(member)
            assert file is not None
            if member.name == TABLE:
                table = json.load(file)
            else:
                files[path.name] = file.read()
    return table, files


def caption(emoji: dict[str, Any]) -> str:
    """Name and kind: what is common to several pictures helps with each."""
    return f"{emoji['name']}, {emoji['subcategory'].replace('-', ' ')}".lower()


def convert(package: bytes, out: Path, groups: Sequence[str] = GROUPS) -> list[str]:
    """Write pictures and captions.

    Variants by colour of skin are entries of their emoji rather than of the table, so that they are left out.

    Args:
        package: The tarball.
        out: Folder to write; it may exist.
        groups: Categories of the table to take.

    Returns:
        The captions.

    Raises:
        ValueError: If there is no such category.
    """
    table, files = contents(package)
    known = sorted({emoji["category"] for emoji in table})
    if missing := [group for group in groups if group not in known]:
        raise ValueError(f"groups {missing} are unknown, allowed: {', '.join(known)}")
    chosen = [emoji for emoji in table if emoji["category"] in groups and emoji["image"] in files]
    out.mkdir(parents=True, exist_ok=True)
    for emoji in chosen:
        picture = out / emoji["image"]
        picture.write_bytes(files[emoji["image"]])
        picture.with_suffix(".txt").write_text(caption(emoji) + "\n", encoding="utf-8")
    captions = [caption(emoji) for emoji in chosen]
    (out / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return captions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument("--file", type=Path, help="the package, if it is already here")
    parser.add_argument("--groups", nargs="+", default=GROUPS, help="categories of emoji")
    options = parser.parse_args(argv)
    if options.file:
        package = options.file.read_bytes()
    else:
        with urllib.request.urlopen(URL) as answer:
            package = answer.read()
    try:
        captions = convert(checked(package, INTEGRITY), options.out, options.groups)
    except ValueError as error:
        parser.error(str(error))
    vocabulary = Vocabulary(words=words_of(captions))
    print(f"{len(captions)} pictures in {options.out}, for vocab_size: {len(vocabulary)}")


if __name__ == "__main__":
    main()
