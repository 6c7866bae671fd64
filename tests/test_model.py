"""model.py against transformers, against slow loops, and against itself under changes that must not matter."""
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lib import chat, decode, hf, logs, parallel
import model as M
from conftest import TINY, tiny_llama

LLAMA31 = TINY | dict(rope_theta=500000.0, rope_scaling=dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64))
QWEN = TINY | dict(model_type="qwen2", rms_norm_eps=1e-6, tie_word_embeddings=True)
QWEN3 = TINY | dict(model_type="qwen3", rms_norm_eps=1e-6, head_dim=16)  # heads wider than hidden_size / heads
MISTRAL = TINY | dict(model_type="mistral", sliding_window=None)
LINEAR = TINY | dict(rope_scaling=dict(rope_type="linear", factor=2.5))


def write_folder(folder, config, seed=0):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    net = M.Llama(hf.read_config(folder))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():  # biases and norms, too, away from their neutral values
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 0.1) + (1.0 if "norm" in name else 0.0))
    hf.save(net, folder)
    return net.eval()


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("config", [TINY, LLAMA31, QWEN, TINY | dict(attention_bias=True), QWEN3, QWEN3 | dict(attention_bias=True, tie_word_embeddings=True),
                                    MISTRAL, MISTRAL | dict(head_dim=16), LINEAR, TINY | dict(rope_scaling=dict(type="linear", factor=4))],
                         ids=["llama", "llama3.1", "qwen2.5", "bias", "qwen3", "qwen3, bias, tied", "mistral", "mistral nemo", "linear", "linear, old spelling"])
def test_logits_equal_transformers(tmp_path, config):
    peer = transformers()
    ours = write_folder(tmp_path, config)
    theirs = peer.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, 97, (3, 130), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.smollm2
def test_smollm2_logits_equal_transformers(smollm2):
    peer = transformers()
    ours = hf.load(smollm2, M.Llama, dtype=torch.float32).eval()
    theirs = peer.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = chat.Chat(smollm2).prompt_ids("What is 12 * 7? Explain each step.")
    tokens = torch.tensor([ids * 4])
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids):].tolist()
    got = decode.generate(ours, [ids], 24, temperature=0, eos_ids=(2,))[0]
    assert got == expected[:len(got)] and (len(got) == 24 or got[-1] == 2)


def test_one_file_and_sharded_index_are_the_same_model(tmp_path):
    net = write_folder(tmp_path / "one", TINY)
    hf.save_tensors(net.named_parameters(), tmp_path / "many", max_bytes=20_000)
    (tmp_path / "many" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    many = hf.load(tmp_path / "many", M.Llama, dtype=torch.float32)
    for (n, p), q in zip(net.named_parameters(), many.parameters()):
        assert torch.equal(p, q), n


# ---- errors name the key, what was expected and what was found

@pytest.mark.parametrize("change, words", [
    (dict(model_type="mixtral"), ["model_type", "'mixtral'", "'llama', 'qwen2', 'qwen3' or 'mistral'"]),
    (dict(model_type="qwen3_moe"), ["model_type", "'qwen3_moe'"]), (dict(model_type="gemma2"), ["model_type", "'gemma2'"]),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), ["rope_type", "yarn", "llama3"]),
    (dict(rope_scaling=dict(rope_type="linear")), ["factor"]), (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), ["rope_type", "dynamic"]),
    (dict(model_type="mistral", sliding_window=255), ["sliding_window is 255, expected null or at least max_position_embeddings, 256"]),
    (dict(model_type="mistral", sliding_window="none"), ["sliding_window is 'none'"]),
    (dict(model_type="mistral", max_position_embeddings=8192), ["sliding_window is 4096", "8192"]),
    (dict(model_type="qwen3", head_dim=None), ["head_dim is None"]), (dict(model_type="qwen3", use_sliding_window=True), ["use_sliding_window"]),
    (dict(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]), ["layer_types", "sliding_attention"]),
    (dict(rope_scaling=dict(rope_type="llama3")), ["factor"]),
    (dict(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
    (dict(hidden_size="32"), ["hidden_size", "'32'", "positive number"]),
    (dict(num_key_value_heads=3), ["num_key_value_heads", "3"]),
    (dict(tie_word_embeddings=1), ["tie_word_embeddings", "1", "boolean"]),
    (dict(mlp_bias=True), ["mlp_bias"]),
])
def test_config_errors(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(ValueError) as e:
        hf.read_config(tmp_path)
    assert all(w in str(e.value) for w in [*words, "config.json"])


def test_a_window_that_holds_every_position_is_none(tmp_path):
    """A window of as many tokens as a sequence may have hides nothing: transformers computes the same with it."""
    peer = transformers()
    ours = write_folder(tmp_path, MISTRAL | dict(sliding_window=130, max_position_embeddings=130))
    theirs = peer.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, 97, (2, 130), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert theirs.config.sliding_window == 130 and (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("config, name", [(LLAMA31, "Llama"), (QWEN3, "Qwen3"), (MISTRAL, "Mistral")], ids=["llama", "qwen3", "mistral"])
def test_a_folder_of_transformers_loads_and_ours_loads_there(tmp_path, config, name):
    peer = transformers()
    torch.manual_seed(0)
    made = getattr(peer, f"{name}Config")(**{k: v for k, v in config.items() if k != "model_type"})
    theirs = getattr(peer, f"{name}ForCausalLM")(made).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hf.load(tmp_path / "theirs", M.Llama, dtype=torch.float32)
    hf.save(ours, tmp_path / "ours")
    again = peer.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    tokens = torch.arange(90)[None]
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_a_token_head_that_config_json_ties_away_is_compared(tmp_path):
    """Qwen3-0.6B has both tensors, equal; where they differ, one of them would silently not be the model's."""
    net = write_folder(tmp_path, QWEN)
    tensors = load_file(tmp_path / "model.safetensors")
    same = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": same}, tmp_path / "model.safetensors")
    hf.check_weights(tmp_path)
    assert torch.equal(hf.load(tmp_path, dtype=torch.float32).head_weight(), net.head_weight())
    same[-1, -1] += 1
    for head, words in ((same, "model.safetensors: lm_head.weight differs from model.embed_tokens.weight"), (same[:-1].clone(), "lm_head.weight has shape")):
        save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        for check in (hf.check_weights, hf.load, lambda folder: hf.load(folder, M.Critic)):
            with pytest.raises(ValueError, match=words + ".*" if words.endswith("shape") else words + ".*tie_word_embeddings"):
                check(tmp_path)


@pytest.mark.parametrize("name, value, words", [
    ("model.norm.weight", None, ["lacks", "model.norm.weight"]),
    ("model.extra.weight", torch.zeros(2), ["unexpected", "model.extra.weight"]),
    ("lm_head.weight", torch.zeros(96, 32), ["lm_head.weight", "[96, 32]", "[97, 32]"]),
])
def test_weight_errors(tmp_path, name, value, words):
    write_folder(tmp_path, TINY)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as e:
        hf.load(tmp_path)
    assert all(w in str(e.value) for w in words)


def test_hostile_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        hf.load(tmp_path / "nowhere")
    write_folder(tmp_path / "m", TINY)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    with pytest.raises(FileNotFoundError, match="from-scratch"):
        hf.load(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="without a folder"):
        hf.load(tmp_path / "m")
    index.unlink()
    (tmp_path / "m" / "model.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        hf.load(tmp_path / "m")


# ---- log-probs

@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_are_no_numbers_of_the_model_are_refused_by_name(tmp_path, kind):
    """Integers and float8 without their scales are not the weights, whatever copy_ makes of them; nothing has to be read to see it."""
    net = tiny_llama()
    hf.save(net, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(kind)}, tmp_path / "model.safetensors")
    for check in (hf.check_weights, hf.load):
        with pytest.raises(ValueError, match="model.safetensors: model.norm.weight has type .*, expected one of F64, F32, BF16, F16"):
            check(tmp_path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].double()}, tmp_path / "model.safetensors")
    assert torch.equal(hf.load(tmp_path, dtype=torch.float32).model.norm.weight, net.model.norm.weight)


@pytest.mark.parametrize("key", sorted(M.LARGEST))
def test_a_config_of_a_million_layers_is_refused_at_once(key):
    with pytest.raises(ValueError, match=f"{key} is 1073741824, expected at most {M.LARGEST[key]}"):
        M.Config.from_dict(TINY | {key: 2**30})


def test_checklist_2_chunked_logprobs_equal_unchunked(monkeypatch):
    net = tiny_llama()
    tokens = torch.randint(0, 97, (4, 21), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(4, 21, dtype=torch.bool)
    mask[:, 5:17] = True
    dense = torch.log_softmax(net(tokens) / 0.7, -1)
    expected = dense[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    grads = []
    for chunk in (1, 7, 1024):
        monkeypatch.setattr(M, "LOGIT_CHUNK", chunk)
        logprob, entropy = net.logprobs(tokens, mask, 0.7)
        assert (logprob[:, 1:] - expected)[mask[:, 1:]].abs().max() < 2e-6 and not logprob[~mask].any()
        assert (entropy[:, 1:] + (dense.exp() * dense).sum(-1)[:, :-1])[mask[:, 1:]].abs().max() < 1e-5
        net.zero_grad()
        logprob.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    net.zero_grad()
    expected[mask[:, 1:]].sum().backward()
    dense_grad = torch.cat([p.grad.flatten() for p in net.parameters()])
    for g in grads:
        assert (g - dense_grad).abs().max() <= 1e-6 * max(1.0, dense_grad.abs().max())


def test_the_entropy_can_be_trained_and_is_never_silently_left_out(monkeypatch):
    """Its gradient, alone and beside that of the log-probs, is that of the definition -sum p log p over whole float64 logits."""
    net, exact = tiny_llama(), tiny_llama().double()
    tokens = torch.randint(0, 97, (4, 21), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(21).expand(4, -1) % 9 > 3
    log_p = torch.log_softmax(exact.model(tokens)[:, :-1] @ exact.lm_head.weight.T / 0.7, -1)
    chosen = log_p.gather(-1, tokens[:, 1:, None])[..., 0][mask[:, 1:]]
    weight = torch.linspace(-1, 2, mask.sum())
    bonus = (weight * -(log_p.exp() * log_p).sum(-1)[mask[:, 1:]]).sum()
    for chunk in (7, 1024):
        monkeypatch.setattr(M, "LOGIT_CHUNK", chunk)
        for with_logprob in (False, True):
            net.zero_grad()
            exact.zero_grad()
            logprob, entropy = net.logprobs(tokens, mask, 0.7)
            ((weight * entropy[mask]).sum() + with_logprob * logprob.sum()).backward()
            (bonus + with_logprob * chosen.sum()).backward(retain_graph=True)
            for (name, p), q in zip(net.named_parameters(), exact.parameters()):
                assert 0 < q.grad.abs().max() and (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max(), name
    assert net.logprobs(tokens, mask, entropy=False)[1] is None  # a loss that adds it is an error, and not a bonus of nothing


def test_checklist_2_logits_are_float32_before_the_softmax():
    net = tiny_llama().to(torch.bfloat16)
    tokens = torch.arange(12)[None]
    mask = torch.arange(12)[None] >= 3
    assert net(tokens).dtype == torch.float32
    logprob, _ = net.logprobs(tokens, mask)
    logits = net.head(net.model.states(tokens, mask)).double()
    reference = torch.log_softmax(logits, -1).gather(-1, tokens[mask][:, None])[:, 0]
    assert (logprob[mask] - reference).abs().max() < 1e-5  # a bfloat16 softmax is off by 1e-2


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes, forward and backward; views of what was there do not count."""
    numel = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, memory = op(*args, **kwargs or {}), lambda x: x.untyped_storage().data_ptr()
        tensors = lambda tree: [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        old = {memory(x) for x in tensors((args, kwargs))}
        self.numel = max([self.numel, *(x.numel() for x in tensors(out) if memory(x) not in old)])
        return out


def test_checklist_2_no_logits_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(M, "LOGIT_CHUNK", 8)
    net = tiny_llama(vocab_size=5000)
    for rows in (2, 4):
        with Largest() as largest:
            tokens = torch.arange(rows * 20).view(rows, 20)
            net.logprobs(tokens, (torch.arange(20) > 4).expand(rows, -1))[0].sum().backward()
        assert largest.numel == 5000 * 32  # the head's gradient; [tokens, V] would be 15 a row times 5000
    with Largest() as largest, torch.no_grad():
        net.logprobs(tokens, (torch.arange(20) > 4).expand(rows, -1))
    assert largest.numel == 8 * 5000


def test_scores_without_pads_equal_the_plain_forward():
    """Values and gradients of rows of many lengths, against one plain forward of each row alone; whatever stands in the pads."""
    torch.manual_seed(0)
    net, critic = tiny_llama(), M.Critic(M.Config.from_dict(TINY))
    lengths, starts, T = [20, 1, 2, 7, 13, 5], [3, 1, 1, 6, 1, 9], 23  # of row 1 and row 5 nothing is scored
    tokens = torch.randint(0, 97, (6, T), generator=torch.Generator().manual_seed(2))
    at = torch.arange(T)
    mask = (at >= torch.tensor(starts)[:, None]) & (at < torch.tensor(lengths)[:, None])
    mask[0, 10] = False  # a hole, such as SFT's untrained pieces leave
    weight = torch.randn(6, T)
    losses, grads = [], []
    for packed in (True, True, False):
        if packed:
            logprob, value = net.logprobs(tokens, mask, 0.7)[0], critic(tokens, mask)
            tokens = torch.where(at < torch.tensor(lengths)[:, None], tokens, (tokens + 1) % 97)  # other pads the second time
        else:
            logprob, value = torch.zeros(6, T), torch.zeros(6, T)
            for b, n in enumerate(lengths):
                if n > 1:
                    score = torch.log_softmax(net(tokens[b : b + 1, :n])[0] / 0.7, -1)[:-1].gather(-1, tokens[b, 1:n, None])[:, 0]
                    logprob[b, 1:n] = score * mask[b, 1:n]
                    value[b, 1:n] = critic.value_head(critic.model(tokens[b : b + 1, :n]))[0, :-1, 0] * mask[b, 1:n]
        assert not logprob[~mask].any() and not value[~mask].any()
        losses.append(torch.stack([logprob, value]).detach())
        for p in (*net.parameters(), *critic.parameters()):
            p.grad = None
        ((logprob * weight).sum() + (value * weight).sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in (*net.parameters(), *critic.parameters())]))
    assert torch.equal(losses[0], losses[1]) and torch.equal(grads[0], grads[1])
    assert (losses[0] - losses[2]).abs().max() < 1e-5 and (grads[0] - grads[2]).abs().max() < 2e-5 * grads[2].abs().max()


def test_checklist_5_token_t_is_scored_by_the_state_before_it():
    """Changing token t changes nothing that t's own value or the score of earlier tokens depends on."""
    torch.manual_seed(0)
    critic = M.Critic(M.Config.from_dict(TINY))
    net, tokens = tiny_llama(), torch.arange(20)[None]
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, 0] = False
    changed = tokens.clone()
    changed[0, 10] = 77
    v, w = critic(tokens, mask), critic(changed, mask)
    assert torch.equal(v[:, :11], w[:, :11]) and not torch.equal(v[:, 11], w[:, 11])
    hidden = critic.model(tokens)
    assert torch.allclose(v[0, 7], hidden[0, 6] @ critic.value_head.weight[0])
    (p, ep), (q, eq) = net.logprobs(tokens, mask), net.logprobs(changed, mask)
    assert torch.equal(p[:, :10], q[:, :10]) and p[0, 10] != q[0, 10] and torch.equal(ep[:, :11], eq[:, :11])


def test_right_padding_does_not_change_a_score():
    net, tokens = tiny_llama(), torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9)[None] >= 4
    alone = net.logprobs(tokens, mask)[0]
    padded = net.logprobs(F.pad(tokens, (0, 6), value=5), F.pad(mask, (0, 6)))[0]
    assert (alone - padded[:, :9]).abs().max() < 1e-6


def test_flops_are_those_of_the_products():
    """Against torch's own counter of a plain forward and backward; it counts attention without the causal half."""
    net = tiny_llama()
    tokens = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(tokens).sum().backward()
    pairs = 6 * 2 * 32 * 64 * (64 - 1)  # what the other half of two layers costs
    assert logs.flops(net.config, [64], 64) + pairs == counter.get_total_flops()
    assert logs.flops(net.config, [3, 64], 0) == logs.flops(net.config, [3], 0) + logs.flops(net.config, [64], 0)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on CPU needs a C++ compiler, g++ is not installed")
def test_compiled_blocks_compute_the_same():
    results = []
    for compiled in (False, True):
        net = tiny_llama()
        if compiled:
            parallel.compile_blocks(net)
        for lengths in ((5, 9, 3), (11, 2)):  # another number of sequences, too
            tokens = torch.arange(len(lengths) * 12).view(-1, 12)
            mask = (torch.arange(12) > 0) & (torch.arange(12) <= torch.tensor(lengths)[:, None])
            logprob = net.logprobs(tokens, mask)[0]
            logprob.sum().backward()
            results.append(logprob.detach())
        results.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    for plain, compiled in zip(results[:3], results[3:]):
        assert (plain - compiled).abs().max() < 1e-5 * max(1, plain.abs().max())


# ---- generate

PROMPTS = [[5], list(range(40)), [9, 8, 7], list(range(3, 20)), [1, 1, 1, 1, 1], [90, 3]]


def naive_greedy(net, prompt, n, eos):
    out = []
    with torch.no_grad():
        while len(out) < n and not (out and out[-1] in eos):
            out.append(int(net(torch.tensor([prompt + out]))[0, -1].argmax()))
    return out


@pytest.mark.parametrize("slots", [1, 2, 6])
@pytest.mark.parametrize("config", [TINY, LLAMA31, QWEN, QWEN3], ids=["llama", "llama3.1", "qwen2.5", "qwen3"])
def test_checklist_17_greedy_cached_decode_equals_the_full_forward(config, slots):
    net = tiny_llama(**config)
    eos = {int(net(torch.tensor([[9, 8, 7]]))[0, -1].argmax())}  # one prompt ends at once, others go on
    expected = [naive_greedy(net, p, 20, eos) for p in PROMPTS]
    assert len({len(e) for e in expected}) > 1
    assert decode.generate(net, PROMPTS, 20, temperature=0, eos_ids=eos, slots=slots) == expected


@pytest.mark.parametrize("temperature", [0, 0.7, 1.3])
@pytest.mark.parametrize("config", [TINY, LLAMA31, QWEN], ids=["llama", "llama3.1", "qwen2.5"])
def test_generate_with_a_cache_gives_the_tokens_of_the_definition(config, temperature):
    net = tiny_llama(**config)
    eos = range(40, 60)
    expected = M.generate(net, PROMPTS, 20, temperature, eos, seed=4)
    assert len({len(response) for response in expected}) > 1  # some end with an EOS
    assert all(t not in eos for response in expected for t in response[:-1])
    for slots in (2, 6):
        assert decode.generate(net, PROMPTS, 20, temperature, eos, seed=4, slots=slots) == expected


def test_checklist_17_cached_logits_equal_the_full_forward():
    net = tiny_llama()
    tokens, logprobs = decode.generate(net, PROMPTS, 16, temperature=0.7, seed=4, slots=3, return_logprobs=True)
    for prompt, response, scores in zip(PROMPTS, tokens, logprobs):
        with torch.no_grad():
            dense = torch.log_softmax(net(torch.tensor([prompt + response]))[0] / 0.7, -1)
        expected = torch.tensor([dense[len(prompt) - 1 + i, t] for i, t in enumerate(response)])
        assert (torch.tensor(scores) - expected).abs().max() < 1e-5


def test_a_response_depends_on_its_seed_and_stream_alone():
    net = tiny_llama()
    run = lambda prompts=PROMPTS, **kw: decode.generate(net, prompts, 12, seed=kw.pop("seed", 1), **kw)
    all_at_once = run()
    assert run() == all_at_once == run(slots=2)
    assert run(seed=2) != all_at_once
    assert run(prompts=PROMPTS[3:], streams=[3, 4, 5]) == all_at_once[3:]
    same = run(prompts=[[5]] * 6)
    assert len({tuple(s) for s in same}) > 3  # several samples of one prompt differ


def test_samples_follow_the_softmax():
    logits = torch.tensor([[2.0, 0.0, -1.0, float("-inf"), 1.0]])
    n = 20000
    tokens, logprobs = decode.sample(logits.expand(n, -1), 0.7, decode.uniforms(0, 0, n))
    counts, p = torch.bincount(tokens, minlength=5).double(), torch.softmax(logits[0].double() / 0.7, -1)
    assert counts[3] == 0
    assert all(abs(counts[i] - n * p[i]) < 5 * math.sqrt(n * p[i] * (1 - p[i])) for i in (0, 1, 2, 4))
    assert decode.sample(logits, 1.0, torch.tensor([0.99999994]))[0].item() == 4 and decode.sample(logits, 0, None)[0].item() == 0


@pytest.mark.parametrize("vocab", [97, 512, 3072])
def test_sampling_in_two_steps_is_the_inverse_of_the_cumulative_sum(vocab):
    """256 tokens make a block: 97 has none, 512 two, 3072 twelve. The oracle sums in float64, so numbers at an edge may go either way."""
    g = torch.Generator().manual_seed(vocab)
    logits, u = 3 * torch.randn(1, vocab, generator=g), torch.rand(4000, generator=g)
    tokens, logprobs = decode.sample(logits.expand(4000, -1), 0.8, u)
    p = torch.softmax(logits[0].double() / 0.8, -1)
    edges = torch.cat([torch.zeros(1, dtype=torch.double), p.cumsum(-1)])
    assert (edges[tokens] - 1e-6 <= u).all() and (u <= edges[tokens + 1] + 1e-6).all()
    assert (logprobs - p[tokens].log()).abs().max() < 1e-5
    assert len(set(tokens.tolist())) > 20


def test_a_finished_sequence_costs_no_compute(monkeypatch):
    net = tiny_llama()
    eos = {int(net(torch.tensor([[9, 8, 7]]))[0, -1].argmax())}
    lengths = [len(naive_greedy(net, p, 20, eos)) for p in PROMPTS]
    rows, step = [], net.decode
    monkeypatch.setattr(net, "decode", lambda tokens, *a: rows.append(tokens.shape) or step(tokens, *a))
    decode.generate(net, PROMPTS, 20, temperature=0, eos_ids=eos, slots=6)
    assert sum(s[0] for s in rows) == sum(lengths)  # one row of work for each token kept


def test_generate_refuses_nonsense():
    net = tiny_llama()
    assert decode.generate(net, [], 5) == []
    for bad in (dict(temperature=-1.0), dict(max_new_tokens=0), dict(slots=0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            decode.generate(net, [[1]], **(dict(max_new_tokens=3) | bad))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        decode.generate(net, [[1], []], 3)


LONG = PROMPTS + [list(range(97)) * 2, [7, *range(50, 90)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_slots_nor_mates_nor_looks_change_a_response(dtype):
    """Also in bfloat16: sequences of more than one block of the cache, several samples of a prompt, slots that free up late.
    Log-probs are those of float32 logits, whose last digits depend on how many rows are multiplied at once."""
    net = tiny_llama(max_position_embeddings=1024).to(dtype)
    run = lambda prompts=LONG * 3, **kw: decode.generate(net, prompts, 150, 0.8, (3,), seed=1, return_logprobs=True, **kw)
    tokens, logprobs = run(slots=24)
    assert 10 < len({len(t) for t in tokens}) and max(map(len, tokens)) > 100
    for kw in dict(slots=4), dict(slots=7), dict(slots=24, look=8), dict(slots=5, look=3):
        again = run(**kw)
        assert again[0] == tokens
        for ours, theirs in zip(again[1], logprobs):
            assert ours == pytest.approx(theirs, rel=0, abs=1e-5)
    cache = decode.KVCache(net.config, 5, 400, dtype, "cpu")
    assert run(cache=cache)[0] == run(cache=cache)[0] == tokens  # what an earlier call left there is never seen
    assert run(LONG[3:], streams=range(3, 8))[0] == tokens[3:8]


def test_generate_refuses_a_cache_of_another_model():
    net = tiny_llama().bfloat16()
    for dtype, change in ((torch.float32, {}), (torch.bfloat16, dict(num_key_value_heads=1)), (torch.bfloat16, dict(num_hidden_layers=1))):
        cache = decode.KVCache(M.Config.from_dict(TINY | change), 2, 40, dtype, "cpu")
        with pytest.raises(ValueError, match="the cache"):
            decode.generate(net, [[1]], 3, cache=cache)


def test_sampled_tokens_equal_a_full_forward_with_the_same_numbers():
    net = tiny_llama()
    for i, (prompt, response) in enumerate(zip(PROMPTS, decode.generate(net, PROMPTS, 30, 0.7, seed=9, slots=4))):
        u, tokens = decode.uniforms(9, i, 30).double(), list(prompt)
        for t in range(30):
            with torch.no_grad():
                cdf = torch.softmax(net(torch.tensor([tokens]))[0, -1].double() / 0.7, -1).cumsum(-1)
            tokens.append(int((cdf <= u[t]).sum()))
        assert response == tokens[len(prompt):]


def test_a_prompt_and_the_head_of_all_are_prefilled_once(monkeypatch):
    net, seen, prefill = tiny_llama(), [], M.Llama.prefill
    monkeypatch.setattr(M.Llama, "prefill", lambda self, tokens, *a: seen.extend(tokens.flatten().tolist()) or prefill(self, tokens, *a))
    prompts = [[1, 2, 3, 10 + i, 20 + i] for i in range(4) for _ in range(6)]  # six samples of each
    stats = {}
    responses = decode.generate(net, prompts, 30, eos_ids=range(40, 60), slots=5, stats=stats)
    assert len({len(r) for r in responses}) > 3  # slots become free at different times
    assert sorted(seen) == [1, 2, 3, 10, 11, 12, 13]  # a prompt's last token is decoded
    assert stats["prefill_padding"] == stats["decode_waste"] == 0 and 0 < stats["kv_use"] < 1
    decode.generate(net, prompts, 30, eos_ids=range(40, 60), slots=5, stats=stats, look=8)
    assert 0 < stats["decode_waste"] < 0.5


def test_the_cache_keeps_to_its_budget():
    config = M.Config.from_dict(TINY)
    row = 2 * 2 * 2 * 8 * 4 * 256  # keys and values x layers x heads x channels x bytes x two blocks
    cache = decode.KVCache.sized(config, 64, 200, torch.float32, "cpu", 3.5 * row / 1e9)
    assert cache.slots == 3 and cache.k.nbytes + cache.v.nbytes == 3 * row
    assert decode.KVCache.sized(config, 2, 200, torch.float32, "cpu", 0).slots == 2
    with pytest.raises(ValueError, match="--kv-gb"):
        decode.KVCache.sized(config, 64, 200, torch.float32, "cpu", 0.9 * row / 1e9)
    with pytest.raises(ValueError, match="need 202 positions, the cache has 200"):
        decode.generate(tiny_llama(), [[1, 2, 3]], 200, cache=cache)


def test_the_benchmark_prints_its_table(capsys):
    import bench
    bench.main(["rollout", "--toy"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("GFLOP/s", "rlsp", "tokens/s", "decode_waste", "limit"))


def test_bfloat16_models_have_logits_and_scores_of_float32_digits(monkeypatch):
    """Against the same products in double: log-probs to five digits, and a head's gradient that many chunks add up to."""
    net, g = tiny_llama(vocab_size=512, scale=2.0).bfloat16(), torch.Generator().manual_seed(0)
    h = torch.randn(96, 32, generator=g).bfloat16().requires_grad_()
    weight, targets = net.head_weight().detach().requires_grad_(), torch.randint(512, (96,), generator=g)
    with torch.no_grad():
        exact = h.double() @ weight.double().T
        assert net.head(h).dtype == torch.float32 and (net.head(h) - exact).abs().max() < 1e-5 * exact.abs().max()
    monkeypatch.setattr(M, "LOGIT_CHUNK", 2)
    M.TokenLogprob.apply(h, weight, targets, 1.0, False)[0].sum().backward()
    wide = weight.detach().double().requires_grad_()
    torch.log_softmax(h.detach().double() @ wide.T, -1).gather(-1, targets[:, None]).sum().backward()
    assert (weight.grad.double() - wide.grad).norm() < 0.003 * wide.grad.norm()

    cache, positions = decode.KVCache(net.config, 2, 40, torch.bfloat16, "cpu"), torch.arange(40)[None]
    q, k, v = (3 * torch.randn(2, heads, 40, 8, generator=g) for heads in (4, 2, 2))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    ours = cache.attention(0, positions, (2,))(0, q, k, v).double()
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert (ours - theirs).norm() < 0.004 * theirs.norm()
