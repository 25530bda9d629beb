"""A page to look at embeddings and listen to their clips.

python -m speechbrain_jepa.explore embeddings/ --out page.html

The embeddings are an output of `speechbrain_jepa.embed`, or a folder that holds one. The page opens
in a browser, without a server and without the network. docs/explore.md has more.
"""

import argparse
import sys

from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.explore.build import AUDIO, explore
from speechbrain_jepa.explore.maps import MAPS
from speechbrain_jepa.files import FolderInUse
from speechbrain_jepa.pages import printable

NAMED = 3  # problems that are printed


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.explore",
        description="A page to look at embeddings and listen to their clips.",
    )
    add = parser.add_argument
    add("embeddings", help="what speechbrain_jepa.embed wrote, or a folder that holds it")
    add("--out", required=True, help="the page, .html")
    add("--map", nargs="+", choices=MAPS, default=["tsne", "pca"], help="the first is shown first")
    add("-k", type=int, default=10, help="neighbours of each clip (default 10)")
    add("--csv", nargs="+", default=[], help="with a column file, and others to colour by")
    add("--colour", help="column shown first (default: the first of the csv, else the folder)")
    add("--duplicates", type=float, default=0.999, help="from this cosine on (default 0.999)")
    add("--audio", choices=AUDIO, default="link", help="where the page finds the sound")
    add("--no_pictures", action="store_true", help="without mel pictures: reads no audio")
    add("--root", help="where relative names of files start (default: where embed ran)")
    add("--title", help="default: the name of the embeddings")
    add("--num_workers", type=int, default=2, help="decoding threads")
    options = parser.parse_args(arguments)
    try:
        made = explore(
            read_embedded(options.embeddings),
            options.out,
            options.map,
            options.k,
            options.duplicates,
            options.csv,
            options.colour,
            options.audio,
            not options.no_pictures,
            options.title,
            options.root,
            options.num_workers,
            progress=sys.stderr.isatty(),
        )
    except (OSError, ValueError, FolderInUse, ModuleNotFoundError) as error:
        raise SystemExit(f"explore: {error}") from error
    size = made.page.stat().st_size / 1e6
    print(f"{made.clips} clips in {made.page} ({size:.1f} MB): open it in a browser")
    if made.duplicates:
        print(f"{len(made.duplicates)} groups of near-duplicates, listed there")
    if made.problems:
        print(f"{len(made.problems)} files cannot be read and have no picture and sound:")
        for problem in made.problems[:NAMED]:
            print(f"  {printable(problem)}")


if __name__ == "__main__":
    main()
