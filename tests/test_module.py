import lightning as L
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_moe import MoEModule
from lit_moe.assets import model_folder
from lit_moe.callbacks import OneShotPruning, ReportWriter
from lit_moe.errors import LitMoEError, NotAnMoEError
from lit_moe.module import LossWeights, OptimizerConfig
from lit_moe.testing import tiny_moe

ARCHITECTURE = {
    "model_type": "mixtral",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}


def quiet():
    return ReportWriter(measure_quality=False, figures=False)


def test_steps_equal_a_bare_loop_of_the_same_work(checkpoint, make_data, make_trainer):
    data = make_data(batch_size=len(make_data().blocks("train")))
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
    module = MoEModule(str(checkpoint), optimizer=optimizer)
    make_trainer(quiet(), max_steps=3).fit(module, datamodule=data)

    bare = MoEModule(str(checkpoint))
    bare.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    bare.configure_model()
    model = bare.built_model
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    ids = data.blocks("train").input_ids
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()
    for (name, mine), (_, theirs) in zip(
        module.built_model.named_parameters(), model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5, msg=name)


def test_training_from_an_architecture_learns(make_data, make_trainer):
    torch.manual_seed(0)
    module = MoEModule(
        architecture=ARCHITECTURE,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        loss=LossWeights(load_balance=0.01),
    )
    trainer = make_trainer(quiet(), max_steps=12)
    trainer.fit(module, datamodule=make_data())
    assert float(trainer.callback_metrics["train/next_token"]) < 6.0  # uniform: ln 1024 = 6.93
    assert 0.9 < float(trainer.callback_metrics["train/load_balance"]) < 2.0


def test_validate_test_and_predict_run(checkpoint, make_data, make_trainer):
    module, data = MoEModule(str(checkpoint)), make_data()
    trainer = make_trainer(limit_val_batches=2)
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert validated["validation/loss"] > 0
    assert tested["test/loss"] > 0
    predicted = trainer.predict(module, datamodule=data)
    assert predicted[0].shape == (8, 31)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"hidden_size": 8}, "needs a model_type"),
        ({"model_type": "mixtrale"}, "mixtrale"),
    ],
)
def test_an_impossible_architecture_is_refused(architecture, message, make_data, make_trainer):
    with pytest.raises(LitMoEError, match=message):
        make_trainer().fit(MoEModule(architecture=architecture), datamodule=make_data())


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(make_data, make_trainer, tmp_path):
    tiny_moe("mixtral", vocab_size=64).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(tmp_path)
    trainer = make_trainer(OneShotPruning("reap", keep_ratio=0.5))
    with pytest.raises(
        LitMoEError, match="1024 ids, but MixtralForCausalLM has embeddings for .*64"
    ):
        trainer.fit(MoEModule(str(tmp_path)), datamodule=make_data())


def test_pruning_a_dense_model_is_refused_in_plain_words(make_data, make_trainer, tmp_path):
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(tmp_path)
    trainer = make_trainer(OneShotPruning("reap", keep_ratio=0.5))
    with pytest.raises(NotAnMoEError, match="llama is a dense model"):
        trainer.fit(MoEModule(str(tmp_path)), datamodule=make_data())


def test_truncated_weights_name_the_file(checkpoint, make_data, make_trainer, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(LitMoEError, match=r"model\.safetensors"):
        make_trainer().fit(MoEModule(str(tmp_path)), datamodule=make_data())


def test_nan_weights_name_the_layer_during_calibration(
    checkpoint, make_data, make_trainer, tmp_path
):
    model = tiny_moe("mixtral", vocab_size=1024)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(tmp_path)
    trainer = make_trainer(OneShotPruning("reap", keep_ratio=0.5), quiet())
    with pytest.raises(LitMoEError, match=r"model\.layers\.1\.mlp.*NaN"):
        trainer.fit(MoEModule(str(tmp_path)), datamodule=make_data())
