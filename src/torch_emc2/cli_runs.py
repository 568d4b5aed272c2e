"""What the command does with a finished run, or with a table of embeddings; torch waits until all words are right."""

from __future__ import annotations

from pathlib import Path

from torch_emc2.cli_arguments import (
    Parser,
    csv,
    data_set,
    embedded,
    finished_run,
    hub_name,
    images,
    parquet,
    path,
    picture,
    similarity,
    table,
    value_range,
    whole,
)

__all__ = ["diagnose", "draw_map", "duplicates", "embed", "evaluate", "export", "neighbours", "report"]

_VALUE_RANGE = "of values deeper than 8 bits: --value-range=0,4095, --value-range=-1000,3000, or --value-range=1%%,99%%"


def evaluate(argv: list[str]) -> None:
    """Measure a run's encoder."""
    parser = Parser(
        prog="emc2 evaluate",
        description="Linear probe and k-NN of a run's encoder, and numbers and a picture that need no labels.",
    )
    parser.add_argument("run", type=finished_run)
    parser.add_argument("--data", type=data_set, metavar="NAME", help="another data set than the run's: folder:PATH, …")
    parser.add_argument("--value-range", type=value_range, help=_VALUE_RANGE)
    parser.add_argument("--baselines", action="store_true", help="the encoder before training and raw pixels beside it")
    args = parser.parse_args(argv)
    from torch_emc2.evaluation import to_text
    from torch_emc2.runs import evaluate_run

    evaluation, written = evaluate_run(args.run, args.data, value_range=args.value_range, baselines=args.baselines)
    print(to_text(evaluation))
    print(f"Written: {', '.join(map(str, written))}")


def diagnose(argv: list[str]) -> None:
    """Measure how wrong each estimator's gradient is."""
    parser = Parser(
        prog="emc2 diagnose", description="How wrong each estimator's gradient is at a run's weights, and why."
    )
    parser.add_argument("run", type=finished_run)
    parser.add_argument("--samples", type=whole(2), default=512, help="random training images, two views each")
    parser.add_argument("--batch-size", type=whole(2), help="by default the run's")
    parser.add_argument("--epochs", type=whole(1), default=64, help="largest number of epochs that are averaged")
    parser.add_argument("--mixing-epochs", type=whole(0), default=20, help="before the first that counts")
    parser.add_argument("--loss", metavar="MODULE:CLASS", help="a loss of your own, to be measured beside the others")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the choice of images and views")
    args = parser.parse_args(argv)
    from torch_emc2.diagnostics.markdown import to_markdown
    from torch_emc2.runs import diagnose_run

    settings = {name: value for name, value in vars(args).items() if name != "run"}
    print(to_markdown(diagnose_run(args.run, **settings)))
    print(f"Written: {args.run}/diagnosis.json, {args.run}/diagnosis.md, {args.run}/diagnosis.png")


def embed(argv: list[str]) -> None:
    """Embed images."""
    parser = Parser(prog="emc2 embed", description="Embed images: a row a path.")
    parser.add_argument("run", type=finished_run)
    parser.add_argument("paths", type=images, nargs="+", metavar="FOLDER_OR_IMAGE")
    parser.add_argument("-o", "--out", type=parquet, required=True, help="Parquet file to write")
    parser.add_argument("--normalize", action="store_true", help="rows of length 1: their products are cosines")
    parser.add_argument("--append", action="store_true", help="keep a table, embed what is new or has changed")
    parser.add_argument("--on-bad-image", choices=("raise", "skip"), help="by default the run's setting")
    parser.add_argument("--value-range", type=value_range, help=_VALUE_RANGE)
    args = parser.parse_args(argv)
    from torch_emc2.data import shown
    from torch_emc2.runs import embed_images

    done = embed_images(
        args.run,
        args.paths,
        args.out,
        on_bad_image=args.on_bad_image,
        value_range=args.value_range,
        normalize=args.normalize,
        append=args.append,
    )
    if done.skipped:
        print(f"Unreadable, and left out: {shown(done.skipped)}")
    told = f"left out: {len(done.skipped)} unreadable, {done.found.left_out.total()} of other kinds"
    there = f"; {done.there} were in the table" if args.append else ""
    print(f"{done.embedded} images embedded; {told}{there}: {args.out}")
    if done.gone:
        print(
            f"{done.gone} of the table's files are not there any more: their rows stay, and all that reads them says so"
        )


def neighbours(argv: list[str]) -> None:
    """Find the images nearest to given ones."""
    parser = Parser(prog="emc2 neighbours", description="The images nearest to given ones: a table and a picture.")
    parser.add_argument("run", type=finished_run)
    parser.add_argument("queries", type=images, nargs="+", metavar="FOLDER_OR_IMAGE")
    parser.add_argument(
        "--in",
        dest="table",
        type=table,
        metavar="EMBEDDINGS.parquet",
        help="where to look, as emc2 embed RUN wrote it; by default the run's training images",
    )
    parser.add_argument("-k", type=whole(1), default=8, help="neighbours of each")
    parser.add_argument("--value-range", type=value_range, help=_VALUE_RANGE)
    parser.add_argument("-o", "--out", type=picture, default=Path("neighbours.png"), help="the picture")
    args = parser.parse_args(argv)
    from torch_emc2.runs import draw_neighbours, find_neighbours

    found = find_neighbours(args.run, args.queries, args.table, args.k, value_range=args.value_range)
    print(f"Cosine similarity, class and name of the nearest of {len(found.gallery)} images:\n{found}")
    draw_neighbours(found, args.out)
    print(f"Written: {args.out}")


def duplicates(argv: list[str]) -> None:
    """Find near duplicates."""
    parser = Parser(
        prog="emc2 duplicates",
        description="Groups of near duplicates: what hangs together by pairs of at least a cosine similarity.",
    )
    parser.add_argument("source", type=embedded, metavar="RUN_OR_PARQUET", help="the run's training images, or a table")
    parser.add_argument("--threshold", type=similarity, default=0.98, help="least similarity (%(default)s)")
    parser.add_argument("-o", "--out", type=picture, default=Path("duplicates.png"), help="the picture")
    parser.add_argument("--csv", type=csv, metavar="FILE.csv", help="all groups as a table, too")
    args = parser.parse_args(argv)
    from torch_emc2.runs import draw_duplicates, find_duplicates, write_duplicates

    found = find_duplicates(args.source, args.threshold)
    if args.csv:
        write_duplicates(found, args.csv)
    if not found.groups:
        print(f"None of {len(found.gallery)} images are as similar as {args.threshold}: lower --threshold for more")
        return
    print(f"{found}\n")
    held = f"{sum(map(len, found.groups))} of {len(found.gallery)} images"
    hold = "1 group holds" if len(found.groups) == 1 else f"{len(found.groups)} groups hold"
    print(f"{hold} {held}. Shown: the cosine similarity to the group's first.")
    if any(hit.similarity < args.threshold for group in found.groups for hit in group):
        print("It is below --threshold where images hang together by others between them.")
    if found.identical:
        print(f"Identical, byte for byte a file that comes before in its group: {len(found.identical)} of these.")
    print(f"--threshold is {args.threshold}: a higher one finds fewer.")
    if 5 * sum(map(len, found.groups)) > len(found.gallery):
        print("These are a large part of all images: hardly all of them are duplicates.")
    draw_duplicates(found, args.out)
    print(f"Written: {args.out}" + (f", {args.csv}" if args.csv else ""))


def draw_map(argv: list[str]) -> None:
    """Draw a map of embeddings."""
    parser = Parser(
        prog="emc2 map", description="A map of embeddings, by t-SNE, coloured by class, else by clusters (HDBSCAN)."
    )
    parser.add_argument("source", type=embedded, metavar="RUN_OR_PARQUET", help="the run's training images, or a table")
    parser.add_argument("--by", choices=("class", "cluster"), default="class", help="what colours say (%(default)s)")
    parser.add_argument("-o", "--out", type=picture, help="the picture; by default map.png, of a run in its folder")
    args = parser.parse_args(argv)
    from torch_emc2.runs import draw_map, map_of

    out = args.out or (args.source / "map.png" if args.source.is_dir() else Path("map.png"))
    draw_map(map_of(args.source, by=args.by), out)
    print(f"Written: {out}")


def report(argv: list[str]) -> None:
    """Write a page on runs."""
    parser = Parser(prog="emc2 report", description="One page on a run, or on several side by side, in a single file.")
    parser.add_argument("runs", type=finished_run, nargs="+", metavar="RUN", help="those that differ in seed are one")
    parser.add_argument("-o", "--out", type=path, default=Path("report.html"), metavar="FILE.html")
    args = parser.parse_args(argv)
    from torch_emc2.runs import write_report

    write_report(args.runs, args.out)
    print(f"Written: {args.out}")


def export(argv: list[str]) -> None:
    """Write a run's backbone as timm takes it."""
    parser = Parser(prog="emc2 export", description="Write a run's backbone to a folder that timm loads, and a card.")
    parser.add_argument("run", type=finished_run)
    parser.add_argument("folder", type=path, help="a new one")
    parser.add_argument("--onnx", action="store_true", help="model.onnx too; needs onnxscript")
    parser.add_argument("--push", type=hub_name, metavar="OWNER/NAME", help="of the hub; a new repository is private")
    args = parser.parse_args(argv)
    from torch_emc2.runs import export_run

    written = export_run(args.run, args.folder, onnx=args.onnx, push=args.push)
    print(f"Written: {', '.join(map(str, written))}")
    if args.push:
        print(f"Pushed: hf-hub:{args.push}")
