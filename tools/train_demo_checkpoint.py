# SPDX-License-Identifier: Apache-2.0
"""Train the embedded demo checkpoint from scratch, on a CPU, in about twenty minutes on four cores.

    python tools/train_demo_checkpoint.py --output vllm_spyre_mm/demo/tiny_granite_vision

Pictures and conversations are drawn by `vllm_spyre_mm.demo.pictures` while training runs, pass
through the processor of transformers as they do in serving, and train transformers' own
`LlavaNextForConditionalGeneration`. Seeds are fixed: batch number n is always the same. At the
end the weights are rounded to bf16, examined on held-out pictures, and written to the folder.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset

from vllm_spyre_mm.compat import ensure_torchvision_importable
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.pictures import (
    COLOURS,
    KINDS,
    PLACES,
    Picture,
    Question,
    Task,
    held_out_tasks,
    questions_about_several,
    questions_without_picture,
    random_picture,
    random_questions,
)

ensure_torchvision_importable()

from transformers import (  # noqa: E402
    GenerationConfig,
    GraniteConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

TILE, PATCH = 48, 8
"""Side of a picture tile, and of a patch of it, in pixels."""

VOCABULARY = 512
"""Rows of the embedding table; the tokenizer fills most of them."""

END, PAD, IMAGE = "<|endoftext|>", "<|pad|>", "<image>"
SPECIAL_TOKENS = (END, PAD, "<|system|>", "<|user|>", "<|assistant|>", IMAGE)
"""Special tokens; each one's id is its index here."""

WORDS = ((*KINDS, "nothing"), (*COLOURS, "nothing"), ("top", "bottom"), ("left", "right"))
"""Words for a quarter of a picture: one of each group is right."""

SYSTEM_PROMPT = "You answer questions about pictures."

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] if part['type'] in ('image', 'image_url') %}
            {{- '<image>\\n' }}
        {%- endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|endoftext|>\\n' if message['role'] == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Conversation:
    """Pictures, and questions about them that are asked one after another."""

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]
    system: bool = False

    def messages(self) -> list[dict[str, Any]]:
        """Chat messages, answers included."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": SYSTEM_PROMPT})
        for index, question in enumerate(self.questions):
            pictures = self.pictures if index == 0 else ()
            messages += Task(pictures, question).messages()
            messages.append({"role": "assistant", "content": question.answer})
        return messages


def grid_pinpoints() -> list[list[int]]:
    """(height, width) in pixels of the tile grids that a picture may be spread over."""
    grids = [(1, n) for n in range(1, 6)] + [(n, 1) for n in range(2, 6)]
    grids += [(2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2)]
    return [[TILE * rows, TILE * columns] for rows, columns in sorted(grids)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the project's own sentences."""
    rng = random.Random("tokenizer")
    sentences = [SYSTEM_PROMPT, "\n"]
    for _ in range(1000):
        pictures = [random_picture(rng, "small") for _ in range(rng.choice((1, 1, 2, 3)))]
        questions = random_questions(rng, pictures, count=99) + questions_without_picture()
        if len(pictures) > 1:
            questions += questions_about_several(pictures)
        for question in questions:
            sentences += [question.text, question.answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaNextProcessor:
    """The processor: Granite Vision's settings at the size of this model."""
    square = {"height": TILE, "width": TILE}
    image_processor = LlavaNextImageProcessor(
        size=square,
        crop_size=square,
        image_grid_pinpoints=grid_pinpoints(),
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaNextProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=0,
    )


def build_config() -> LlavaNextConfig:
    """The model's configuration: Granite Vision's shape, about a thousandth of its size."""
    vision = SiglipVisionConfig(
        image_size=TILE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 300000.0},
        attention_bias=False,
        mlp_bias=False,
        embedding_multiplier=2.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=1 / 64,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(END),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index(IMAGE),
        image_grid_pinpoints=grid_pinpoints(),
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=[-4, -3, -2, -1],
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=True,
        use_image_newline_parameter=True,
        architectures=["LlavaNextForConditionalGeneration"],
        bos_token_id=SPECIAL_TOKENS.index(END),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )


def build_model(config: LlavaNextConfig, seed: int) -> LlavaNextForConditionalGeneration:
    """A randomly initialised model in fp32.

    Granite divides attention scores by the head size and not by its square root, so queries and
    keys start wider; it divides its logits, so the embeddings that yield them start wider too.
    """
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config)
    std = config.text_config.initializer_range
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=4 * std)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.normal_(std=2 * std)
            layer.self_attn.k_proj.weight.normal_(std=2 * std)
        model.model.multi_modal_projector.linear_2.bias.zero_()
        model.model.image_newline.normal_(std=4 * std)
    return model


class Glances(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches for the warm-up, by number: whole pictures squeezed onto one tile each."""

    def __init__(
        self, processor: LlavaNextProcessor, steps: int, batch_size: int, seed: int
    ) -> None:
        self.processor = processor
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles (batch, 3, TILE, TILE), and `words_of_patches` of them (batch, patches, 4)."""
        rng = random.Random(f"glances-{self.seed}-{step}")
        pictures = [random_picture(rng) for _ in range(self.batch_size)]
        tiles = self.processor.image_processor(
            [picture.image for picture in pictures],
            image_grid_pinpoints=[[TILE, TILE]],
            return_tensors="pt",
        )["pixel_values"][:, 0]
        return tiles, torch.stack([words_of_patches(picture) for picture in pictures])


def words_of_patches(picture: Picture) -> torch.Tensor:
    """(patches, 4): for each group of `WORDS`, the number of the right word for each patch.

    A patch is described by what is drawn in its quarter of the picture.
    """
    quarters = []
    drawn = {shape.place: shape for shape in picture.shapes}
    for place in PLACES:
        shape = drawn.get(place)
        right = (shape.kind, shape.colour) if shape else ("nothing", "nothing")
        words = (*right, *place.split())
        quarters.append([group.index(word) for group, word in zip(WORDS, words, strict=True)])
    side = TILE // PATCH
    far = (torch.arange(side) >= side // 2).long()
    quarter = (2 * far[:, None] + far[None, :]).flatten()
    return torch.tensor(quarters)[quarter]


class Conversations(Dataset[dict[str, torch.Tensor]]):
    """Training batches by number; each depends on its number and the seed alone."""

    def __init__(
        self, processor: LlavaNextProcessor, steps: int, batch_size: int, seed: int
    ) -> None:
        self.processor = processor
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """The model's inputs for one step, right-padded, and `labels` (-100: no loss)."""
        rng = random.Random(f"training-{self.seed}-{step}")
        kind = self._kind_of_batch(rng, step)
        count = self.batch_size // (2 if kind in ("large", "several-large") else 1)
        conversations = [_conversation(rng, kind) for _ in range(count)]
        return encode(self.processor, conversations)

    def _kind_of_batch(self, rng: random.Random, step: int) -> str:
        """Small single pictures first; later on every size, and several pictures at once."""
        progress = step / self.steps
        if progress < 0.35:
            weights = (0.85, 0.1, 0.0, 0.05, 0.0)
        else:
            weights = (0.25, 0.2, 0.25, 0.2, 0.1)
        kinds = ("small", "medium", "large", "several", "several-large")
        return rng.choices(kinds, weights)[0]


def _conversation(rng: random.Random, kind: str) -> Conversation:
    """A random conversation for one kind of batch."""
    if rng.random() < 0.06:
        pictures: tuple[Picture, ...] = ()
    elif kind.startswith("several"):
        size = rng.choice(("medium", "large")) if kind == "several-large" else "small"
        pictures = tuple(random_picture(rng, size) for _ in range(rng.choice((2, 2, 3))))
    else:
        pictures = (random_picture(rng, kind),)
    questions = random_questions(rng, pictures, count=rng.choice((1, 4, 6, 8)))
    return Conversation(pictures, tuple(questions), system=rng.random() < 0.1)


def encode(
    processor: LlavaNextProcessor, conversations: Sequence[Conversation]
) -> dict[str, torch.Tensor]:
    """Tensors of a batch of whole conversations; only answers and their end carry a label."""
    texts = [
        processor.apply_chat_template(conversation.messages(), tokenize=False)
        for conversation in conversations
    ]
    images = [picture.image for talk in conversations for picture in talk.pictures]
    batch = processor(
        text=texts,
        images=images or None,
        return_tensors="pt",
        text_kwargs={"padding": True, "padding_side": "right"},
    )
    tensors = {
        name: batch[name] for name in ("input_ids", "pixel_values", "image_sizes") if name in batch
    }
    tensors["labels"] = answer_labels(tensors["input_ids"])
    return tensors


def answer_labels(input_ids: torch.Tensor) -> torch.Tensor:
    """Labels, shaped like `input_ids` (batch, length): token ids inside answers, else -100.

    An answer begins two tokens after ``<|assistant|>`` (a line break follows it), and ends with
    ``<|endoftext|>``.
    """
    start, end = SPECIAL_TOKENS.index("<|assistant|>"), SPECIAL_TOKENS.index(END)
    labels = torch.full_like(input_ids, -100)
    for row, tokens in enumerate(input_ids.tolist()):
        inside = False
        for column, token in enumerate(tokens):
            if inside:
                labels[row, column] = token
                inside = token != end
            elif column and tokens[column - 1] == start:
                inside = True
    return labels


def answer_loss(
    model: LlavaNextForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens.

    Granite divides its logits by `logits_scaling`. Serving engines do so for LLaVA-Next too, but
    transformers' LLaVA-Next does not; it is done here so that served probabilities are right.
    """
    inputs = {name: batch[name] for name in batch if name != "labels"}
    labels = batch["labels"][:, 1:]
    # On a CPU the fused attention has a slow backward pass: plain attention wins while it fits.
    plain = batch["input_ids"].shape[1] <= 450
    model.set_attn_implementation("eager" if plain else "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[labels != -100])
    logits = logits.float() / model.config.text_config.logits_scaling
    return torch.nn.functional.cross_entropy(logits, labels[labels != -100])


def project(model: LlavaNextForConditionalGeneration, tiles: torch.Tensor) -> torch.Tensor:
    """Projected features (tiles, patches, width) of `tiles` (tiles, 3, TILE, TILE)."""
    states = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in model.config.vision_feature_layer]
    return model.model.multi_modal_projector(torch.cat(chosen, dim=-1))


def warm_up(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    args: argparse.Namespace,
) -> None:
    """Teach the vision tower and the projector to tell shapes, colours and places apart.

    The features of a patch learn to point towards the decoder's embeddings of the words for it.
    The decoder learns to answer far sooner on features that already mean something to it.
    """
    directions = word_directions(model, processor)
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    weights = [weight for part in parts for weight in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    data = Glances(processor, args.warm_up_steps, 4 * args.batch_size, args.seed)
    begin = time.monotonic()
    for step, (tiles, words) in enumerate(loader(data, args)):
        set_learning_rate(optimizer, learning_rate(step, len(data), 1.5 * args.lr))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = project(model, tiles).float()
        losses = [
            torch.nn.functional.cross_entropy((features @ rows.T).flatten(0, 1), right.flatten())
            for rows, right in zip(directions, words.unbind(-1), strict=True)
        ]
        optimize(optimizer, weights, sum(losses))
        if step % 50 == 49 or step + 1 == len(data):
            terms = " + ".join(f"{loss.item():.3f}" for loss in losses)
            seconds = time.monotonic() - begin
            print(f"warm-up {step + 1}/{len(data)}: loss {terms}, {seconds:.0f} s", flush=True)


def word_directions(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor
) -> list[torch.Tensor]:
    """For each group of `WORDS`, the embeddings of its words (words, width), of length 5.

    That length makes features certain of their words about as long as the embeddings are.
    """
    embeddings = model.get_input_embeddings().weight.detach()
    directions = []
    for group in WORDS:
        first = [processor.tokenizer.encode(" " + word)[-1] for word in group]
        directions.append(5 * torch.nn.functional.normalize(embeddings[first], dim=-1))
    return directions


def loader(data: Dataset[Any], args: argparse.Namespace) -> DataLoader[Any]:
    """`data` in order, made in other processes ahead of need."""
    return DataLoader(data, batch_size=None, num_workers=args.workers, prefetch_factor=4)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of `optimizer`, times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def optimize(
    optimizer: torch.optim.Optimizer, weights: Sequence[torch.Tensor], loss: torch.Tensor
) -> None:
    """One step down the gradient of `loss`, clipped to a norm of 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to one per cent of `peak`."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    args: argparse.Namespace,
) -> None:
    """Train `model` in place for ``args.steps`` steps."""
    weights = list(model.parameters())
    seeing = [*model.model.vision_tower.parameters()]
    seeing += [*model.model.multi_modal_projector.parameters()]
    rest = [weight for weight in weights if all(weight is not other for other in seeing)]
    groups = [{"params": rest, "scale": 1.0}, {"params": seeing, "scale": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    data = Conversations(processor, args.steps, args.batch_size, args.seed)
    model.train()
    begin, average = time.monotonic(), 0.0
    for step, batch in enumerate(loader(data, args)):
        set_learning_rate(optimizer, learning_rate(step, args.steps, args.lr))
        loss = answer_loss(model, batch)
        optimize(optimizer, weights, loss)
        average += (loss.item() - average) / min(step + 1, 50)
        if step % 50 == 49 or step + 1 == args.steps:
            seconds = time.monotonic() - begin
            print(f"step {step + 1}/{args.steps}: loss {average:.4f}, {seconds:.0f} s", flush=True)
    model.set_attn_implementation("sdpa")
    model.eval()


@torch.inference_mode()
def answer(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, tasks: Sequence[Task]
) -> tuple[list[str], list[float]]:
    """Greedy answers to a batch of tasks, and each answer's smallest margin.

    A margin is the distance between the two highest logits of a step, divided by Granite's
    `logits_scaling`: the difference of their log-probabilities.
    """
    texts = [
        processor.apply_chat_template(task.messages(), tokenize=False, add_generation_prompt=True)
        for task in tasks
    ]
    images = [image for task in tasks for image in task.images]
    inputs = processor(
        text=texts,
        images=images or None,
        return_tensors="pt",
        text_kwargs={"padding": True, "padding_side": "left"},
    ).to(dtype=model.dtype)
    output = model.generate(
        **inputs, max_new_tokens=48, output_logits=True, return_dict_in_generate=True
    )
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    best = torch.stack(output.logits, dim=1).float().topk(2).values
    margins = (best[..., 0] - best[..., 1]) / model.config.text_config.logits_scaling
    margins = margins.masked_fill(tokens == model.config.pad_token_id, math.inf)
    answers = processor.batch_decode(tokens, skip_special_tokens=True)
    return answers, margins.amin(dim=1).tolist()


def examine(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    tasks: Sequence[Task],
    batch_size: int = 20,
) -> int:
    """Print right answers by type of question, mistakes and margins; return the right ones."""
    ordered = sorted(tasks, key=lambda task: sum(im.width * im.height for im in task.images))
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    margins: list[float] = []
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        answers, smallest = answer(model, processor, group)
        margins += smallest
        for task, text in zip(group, answers, strict=True):
            total[task.question.type] += 1
            right[task.question.type] += text == task.question.answer
            if text != task.question.answer:
                sizes = [image.size for image in task.images]
                print(
                    f"  wrong: {task.question.text} {sizes} {text!r}, not {task.question.answer!r}"
                )
    for kind, count in sorted(total.items()):
        print(f"  {kind}: {right[kind]} of {count}")
    points = torch.tensor(sorted(margins)).quantile(torch.tensor([0.0, 0.01, 0.05, 0.5]))
    print(
        "  smallest margin per answer, in nats (min, 1 %, 5 %, median):",
        " ".join(f"{point:.2f}" for point in points.tolist()),
    )
    print(f"  right: {right.total()} of {len(ordered)}")
    return right.total()


def save(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, folder: Path
) -> None:
    """Write the checkpoint into `folder`, replacing its files one by one."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            if file.suffix == ".json":
                settings = json.loads(file.read_text())
                if file.name == "tokenizer_config.json":
                    settings = portable_tokenizer_settings(settings)
                file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            file.chmod(0o644)
            shutil.move(file, folder / file.name)


def portable_tokenizer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's settings in words that transformers 4 knows as well."""
    settings = {name: value for name, value in settings.items() if name != "backend"}
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return dict(sorted(settings.items()))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=checkpoint_path())
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up-steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    return parser.parse_args()


def main() -> None:
    """Train, round, examine and write."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    processor = build_processor()
    model = build_model(build_config(), args.seed)
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{count:,} parameters, {len(processor.tokenizer)} tokens")
    warm_up(model, processor, args)
    train(model, processor, args)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    save(model, processor, args.output)
    print("bf16 weights, computed in fp32:")
    examine(model.float(), processor, held_out_tasks(200))
    print("bf16 weights, computed in bf16:")
    examine(model.bfloat16(), processor, held_out_tasks(200))


if __name__ == "__main__":
    main()
