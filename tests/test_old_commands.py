"""The page docs/old_commands.md: every command parses, every flag has its key, every key works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_commands import commands_of, parse
from mmengine.config import DictAction

from patchreg.runner.build import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/old_commands.md").read_text()
GAME = """--patch_size --use_fp16 --weight_decay --weight_decay_end --clip_grad --batch_size_per_gpu --epochs
    --freeze_last_layer --lr --min_lr --warmup_epochs --optimizer --global_crops_scale --data_path --output_dir
    --saveckp_freq --seed --num_workers --dist_url --local_rank --patch_hidden_size --sender_arch --sender_norm
    --use_context --sender_dropout --vocab_size --max_len --start_temperature --temperature
    --warmup_gumbel_epochs --trainable_temperature --hard --topk --receiver_arch --receiver_dim
    --receiver_hidden_size --receiver_num_heads --receiver_num_layers"""
WEIGHTS = "--pretrained_weights --arch --patch_size --checkpoint_key"
ANCHOR = "--data --dataset --arch --epochs --batch-size --num-workers --gpu --manual_seed"
ANCHOR_TRAINING = (
    f"{ANCHOR} --init-lr --lr-type --milestones --resume -r --evaluate -e --checkpoint-dir"
)
FLAGS = {
    "DGE main.py": """--batch-size --epochs --model --input-size --drop --drop-path --model-ema
        --model-ema-decay --model-ema-force-cpu --opt --opt-eps --opt-betas --momentum --weight-decay
        --clip-grad --sched --lr --warmup-lr --min-lr --warmup-epochs --lr-noise --lr-noise-pct --lr-noise-std
        --linear-warmup
        --decay-epochs --decay-rate --dr --patience-epochs --cooldown-epochs --eval-epochs --checkpoint-epochs
        --no-tensorboard --color-jitter --aa --train-interpolation --reprob --remode --recount --resplit
        --smoothing --mixup --cutmix --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode
        --repeated-aug --no-repeated-aug --teacher-model --teacher-path --distillation-type
        --distillation-alpha --distillation-tau --finetune --pretrain --data-path --data-set --inat-category
        --output_dir --device --seed --num_workers --pin-mem --no-pin-mem --resume --start_epoch --eval
        --dist-eval --world_size --dist_url --dge-enable --dge-budget --dge-lr-scale""",
    "PatchGame train.py": GAME,
    "PatchGame eval_knn.py": """--batch_size_per_gpu --nb_knn --temperature --pretrained_weights --use_cuda
        --arch --dump_features --load_features --num_workers --dist_url --world_size --local_rank
        --data_path""",
    "PatchGame eval_patchrank.py": """--batch_size_per_gpu --use_cuda --vit_model --speaker_arch --sender_arch
        --patch_model --speaker_model --im_size --patch_size --num_workers --dist_url --world_size --local_rank
        --gpu --data_path --topk""",
    "PW-Self patch_wise_dino.py": """--arch --patch_size --out_dim --norm_last_layer --use_bn_in_head
        --momentum_teacher --warmup_teacher_temp --teacher_temp --warmup_teacher_temp_epochs --use_fp16
        --weight_decay --weight_decay_end --clip_grad --batch_size_per_gpu --epochs --freeze_last_layer --lr
        --warmup_epochs --min_lr --optimizer --drop_path_rate --global_crops_number --global_crops_scale
        --local_crops_number --local_crops_scale --global_scale --local_scale --data_path --output_dir
        --saveckp_freq --seed --num_workers --dist_url --local_rank""",
    "PW-Self run_with_submitit.py": "--ngpus --nodes --timeout --partition --use_volta32 --comment",
    "PW-Self eval_knn.py": f"""--batch_size_per_gpu --nb_knn --temperature --use_cuda {WEIGHTS} --dump_features
        --load_features --num_workers --dist_url --local_rank --data_path""",
    "PW-Self eval_linear.py": f"""--n_last_blocks --avgpool_patchtokens {WEIGHTS} --epochs --lr
        --batch_size_per_gpu --data_path --num_workers --val_freq --output_dir --num_labels --evaluate""",
    "PW-Self eval_image_retrieval.py": f"""--data_path --dataset --multiscale --imsize --use_cuda {WEIGHTS}
        --num_workers""",
    "PW-Self eval_copy_detection.py": f"""--data_path --whitening_path --distractors_path --imsize
        --batch_size_per_gpu --use_cuda {WEIGHTS} --num_workers""",
    "PW-Self eval_video_segmentation.py": f"""{WEIGHTS} --output_dir --data_path --n_last_frames
        --size_mask_neighborhood --topk --bs""",
    "PW-Self visualize_attention.py": f"{WEIGHTS} --image_path --image_size --output_dir --threshold",
    "PW-Self video_generation.py": f"""{WEIGHTS} --input_path --output_path --threshold --resize --video_only
        --fps --video_format""",
    "PatchDrop classifier_training.py": """--lr --beta --wd --model --data_dir --load --cv_dir --batch_size
        --epoch_step --max_epochs --parallel --test_interval --img_size --mode""",
    "PatchDrop pretrain.py, finetune.py, finetune2stream.py": """--lr --model --data_dir --load --ckpt_hr_cl
        --ckpt_lr_cl --cv_dir --batch_size --max_epochs --parallel --test_interval --penalty --alpha
        --lr_size""",
    "AnchorNet train_anchornet.py": ANCHOR_TRAINING,
    "AnchorNet train_downnet_resized.py": f"{ANCHOR_TRAINING} --patch-size --pretrained-downnet",
    "AnchorNet train_downnet_patch.py": f"""{ANCHOR_TRAINING} --patch-size --iou-threshold --stride --topk
        --pretrained-anchornet --pretrained-downnet""",
    "AnchorNet make_table.py": f"""{ANCHOR} --patch-size --iou-thresholds --stride --topk --pretrained-anchornet
        --resized-pretrained --patch-pretrained""",
    "AnchorNet dynamic_inference.py": "--arch --checkpoint-dir",
    "AnchorNet visualize.py": """--data --dataset --batch-size --patch-size --iou-threshold --stride --topk
        --num-workers --gpu --manual_seed --pretrained-anchornet""",
}
"""Flags by script, from the command lines of the authors' repositories."""


def sections() -> dict[str, str]:
    """The tables of flags by script."""
    parts = re.split(r"^### (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE)
    return [row for row in found if row[0] != "flag" and set(row[0]) != {"-"}]


STAGES = {"work_dirs": "work_dirs"}
"""Checkpoints of earlier stages need not exist."""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that stands for FILE; the tests run in the root of the project."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "file.pth"
    file.touch()
    return str(file)


def test_every_row_of_the_commands_parses(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(PAGE.split("## Flags")[0])[1:]
    assert len(table) >= 35
    for old, new in table:
        assert old.strip()
        (command,) = commands_of(new.replace("FILE", weights))
        arguments = parse(command, monkeypatch)
        config = getattr(arguments, "config", None)
        if config is not None:
            load_config(config, getattr(arguments, "cfg_options", None), moved=STAGES)


@pytest.mark.parametrize("script", FLAGS)
def test_every_flag_has_its_row_and_every_key_works(
    script: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sections()[script]
    table = rows(text)
    named = [flag for flags, _ in table for flag in re.findall(r"`(--?[\w-]+)`", flags)]
    assert sorted(named) == sorted(FLAGS[script].split())
    default = re.search(r"Keys of `(configs/\S+\.py)`", text)
    options = {}
    for flags, here in table:
        answers = [part for part in re.findall(r"`([^`]+)`", here) if not part.startswith("--")]
        assert answers or re.match(r"none: .{10,}|the (first )?argument\b|.* there\b", here), flags
        for answer in answers:
            key, equals, value = answer.partition("=")
            if answer.startswith("configs/") and "*" not in answer:
                assert (ROOT / answer).exists(), answer
            elif answer.startswith("tools/") and " " in answer and " JOB " not in answer:
                parse(answer, monkeypatch)
            elif equals and re.fullmatch(r"[a-z_]\w*(\.\w+)*", key) and "dict(" not in value:
                options[key] = DictAction._parse_iterable(value.replace("FILE", weights))
    if default is None:
        assert not options
        return
    loaded = load_config(default[1], options, moved=STAGES)
    for key, value in options.items():
        node = loaded
        for part in key.split("."):
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
        assert node == value or list(node) == list(value), key


def test_no_table_is_of_a_script_that_is_not_known() -> None:
    assert set(sections()) == set(FLAGS)
