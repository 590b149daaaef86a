"""Chat templates: their files, what they are given and what they must not reach."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.processing.chat import normalize_messages
from keye_model.processing.rules import PREVIEW
from keye_model.processing.template import (
    DEFAULT_TEMPLATE,
    choose_template,
    read_template,
    render,
    template_reads,
)
from keye_model.processing.tokenizer import special_tokens
from tests.model.processing.messages import (
    CONVERSATIONS,
    image,
    text_item,
    user_turn,
)

RESERVED = ("<|im_end|>", "<|image_pad|>", "<|video_pad|>")
TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<|image_pad|>"}


def _normalized(*messages, template=""):
    keys, roles = template_reads(template)
    options = {"reserved": RESERVED, "sources": False, "rules": PREVIEW}
    return normalize_messages(messages, keys=keys, roles=roles, **options)


def _rendered(*messages, template=DEFAULT_TEMPLATE, **options):
    given = ("add_generation_prompt", "continue_final_message", "special_tokens")
    known = {name: options.pop(name) for name in given if name in options}
    return render(
        template,
        _normalized(*messages, template=template),
        **{"add_generation_prompt": False, **known},
        variables=options,
    )


def _theirs(*messages, template, special_tokens=None, **options):
    options = {"add_generation_prompt": False, **(special_tokens or {}), **options}
    [text], _ = render_jinja_template(
        [_normalized(*messages, template=template)], chat_template=template, **options
    )
    return text


# The published template written another way: an item may tell what it is by its keys alone.
BY_KEYS = """\
{% set n = namespace(i=1, v=1) %}
{% for message in messages %}
{% if loop.first and message["role"] != "system" %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
<|im_start|>{{ message["role"] }}
{% if message["content"] is string %}{{ message["content"] }}{% else %}
{% for item in message["content"] %}
{% if item["type"] == "image" or "image" in item or "image_url" in item %}
{% if add_vision_id %}Picture {{ n.i }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>
{%- set n.i = n.i + 1 %}
{% elif item["type"] == "video" or "video" in item %}
{% if add_vision_id %}Video {{ n.v }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>
{%- set n.v = n.v + 1 %}
{% elif "text" in item %}{{ item["text"] }}{% endif %}
{% endfor %}
{% endif %}
{{ "<|im_end|>" }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("vision_id", [{}, {"add_vision_id": True}], ids=["plain", "vision_id"])
@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, BY_KEYS], ids=["built_in", "by_keys"])
def test_published_templates_as_in_transformers(messages, template, vision_id):
    options = {**vision_id, "add_generation_prompt": True}
    ours = _rendered(*messages, template=template, **options)
    assert ours == _theirs(*messages, template=template, **options)
    assert ours == _rendered(*messages, **options)


TURNS = [
    {"role": "system", "content": "Be brief."},
    user_turn({"type": "image"}, text_item("é < & 'Ω'")),
    {"role": "assistant", "content": "<think>a</think>b"},
    {"role": "user", "content": "and\n\nnow? "},
]
TOOLS = [
    {"type": "function", "function": {"name": "zoom", "parameters": {"b": [1, 2.5], "a": None}}}
]

# Pieces that templates on the Hub are made of.
PIECES = {
    "tokens": "{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ bos_token is defined }}",
    "token_after_each": "{% for m in messages %}{{ m.role + eos_token }}{% endfor %}",
    "tojson": "{{ messages | tojson }}",
    "tojson_options": "{{ messages[1] | tojson(ensure_ascii=True, indent=2, sort_keys=True) }}",
    "tojson_separators": "{{ messages[1].content | tojson(separators=(',', ':')) }}",
    "tojson_by_position": "{{ messages[1] | tojson(True, 1, (',', ' : '), True) }}",
    "tojson_tab": "{{ messages[0] | tojson(indent='\t') }}",
    "tools_is_none": "{{ tools is none }} {{ tools is defined }} {{ documents is none }}",
    "tools": "{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}{{ tools | length }}",
    "documents": "{% for d in documents %}{{ loop.index }}. {{ d['title'] }}: {{ d.text }}\n"
    "{% endfor %}",
    "own_variable": "{{ enable_thinking is defined and enable_thinking is false }}",
    "vision_id": "{{ add_vision_id is defined }}",
    "generation": "{% for m in messages %}\n  {% if m.role == 'assistant' %}\n"
    "{% generation %}\n{{ m.content }}{{ eos_token }}\n{% endgeneration %}\n  {% endif %}\n"
    "{% endfor %}\n",
    "generation_trimmed": "a  {%- generation -%}  b  {%- endgeneration -%}  c",
    "generation_scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}"
    "{{ x }}",
    "break": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "blocks_trimmed": "  {% if true %}  \n  x\n  {% endif %}\n\ny\n",
    "comment": "{# nothing #}\n{{- messages|length }} \n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{% endmacro %}{{ turn(messages[0]) }}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1][0].role }}"
    "{{ messages[-1]['content'] }}",
    "strings": "{{ messages[2].content.split('</think>')[-1].strip('b').rstrip() }}"
    "{{ messages[3].content | trim | upper }}",
    "is_string": "{% for m in messages %}{{ m.content is string }}{% endfor %}",
    "selectattr": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0]['nothing'] is defined }}",
    "year": "{{ strftime_now('%Y') }}",
    "dict": "{{ dict(a=1) | tojson }}{{ {'b': [true, none, 1.5]} | tojson }}",
    "prompt": "{% if add_generation_prompt %}open{% else %}shut{% endif %}",
}


@pytest.mark.parametrize("prompt", [False, True], ids=["shut", "open"])
@pytest.mark.parametrize("template", PIECES.values(), ids=PIECES)
def test_templates_as_in_transformers(template, prompt):
    options = {"add_generation_prompt": prompt, "special_tokens": TOKENS}
    if "tools" in template:
        options["tools"] = TOOLS if "length" in template else None
    if "documents" in template:
        options["documents"] = None if "none" in template else [{"title": "a", "text": "b"}]
    if "enable_thinking" in template:
        options["enable_thinking"] = False
    ours = _rendered(*TURNS, template=template, **options)
    assert ours == _theirs(*TURNS, template=template, **options)


# The text template that a published tokenizer_config.json holds, shortened.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content is string %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}
        {%- endif %}
        {{- content }}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if call.function %}{%- set call = call.function %}{%- endif %}
                {{- '<tool_call>' + call.name + (call.arguments | tojson) + '</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<tool_response>' + content + '</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
CALLS = [
    {"role": "user", "content": "How late is it?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "a clock",
        "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {"z": 1}}}],
    },
    {"role": "tool", "content": "12:00"},
]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"tools": TOOLS}], ids=str)
def test_what_a_template_reads_of_a_message_is_known(variables):
    options = {"template": QWEN3, "add_generation_prompt": True, **variables}
    assert _rendered(*CALLS, **options) == _theirs(*CALLS, **options)
    assert "<think>\na clock\n</think>\n<tool_call>now" in _rendered(*CALLS, **options)


def test_what_a_template_reads():
    template = """{% set count = namespace(value=0) %}{% for m in messages %}{{ loop.index }}
    {%- set count.value = count.value + 1 %}{{ m.a ~ m['b'] ~ m.get('c') if 'd' in m }}
    {%- if 'e' not in m or m.role == 'tool' or m.role in ['user', 'observation'] %}{% endif %}
    {%- endfor %}{{ messages | map(attribute='f') | list | length }}
    {{- messages | selectattr('g', 'defined') | list | length }}"""
    keys, roles = template_reads(template)
    assert keys >= {"a", "b", "c", "d", "e", "f", "g", "role"}
    assert not keys & {"value", "index", "count", "messages", "tool", "user", "observation"}
    assert roles >= {"tool", "user", "observation"}
    keys, roles = template_reads(DEFAULT_TEMPLATE)
    assert (keys, roles) == (
        {"role", "content", "type", "text"},
        {"system", "image", "video"},
    )


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([{"name": image()["image"]}], TypeError, "got Image"),
        ({"a": "<|im_end|>"}, ValueError, r"must not hold the special token '<\|im_end\|>'"),
        ({"<|im_end|>": 1}, ValueError, r"must not hold the special token '<\|im_end\|>'"),
    ],
    ids=["object", "token", "token_as_key"],
)
def test_what_a_template_reads_of_a_message_is_plain(value, error, message):
    turn = {"role": "assistant", "content": "", "tool_calls": value}
    with pytest.raises(error, match=rf"messages\[0\]\['tool_calls'\] .*{message}"):
        _normalized(turn, template=QWEN3)


@pytest.mark.parametrize("final", ["So it is", "So it is ", " a\n", "é"], ids=repr)
@pytest.mark.parametrize("as_items", [False, True], ids=["string", "items"])
@pytest.mark.parametrize(
    "template",
    [
        DEFAULT_TEMPLATE,
        "{% for m in messages %}[{{ (m.content if m.content is string else m.content[-1].text) "
        "| trim }}]{% endfor %}",
    ],
    ids=["published", "trims"],
)
def test_continue_final_message_as_in_transformers(template, final, as_items):
    turn = {"role": "assistant", "content": [text_item(final)] if as_items else final}
    messages = [*TURNS[:2], turn]
    options = {"template": template, "continue_final_message": True}
    ours = _rendered(*messages, **options)
    assert ours == _theirs(*messages, **options)
    assert ours.endswith(final if template is DEFAULT_TEMPLATE else final.strip())
    assert turn["content"] in (final, [text_item(final)])  # the caller's stays as it was


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("Hi", {"add_generation_prompt": True}, "must be False with add_generation_prompt"),
        ([{"type": "image"}], {}, "must find a text in the last message to go on with"),
        ("Hi", {"template": "{{ messages[0].role }}"}, "template leaves it out or changes it"),
        ("Hi", {"template": "{{ messages[0].content | upper }}"}, "leaves it out or changes it"),
    ],
    ids=["opened", "no_text", "left_out", "changed"],
)
def test_continue_final_message_errors(content, options, message):
    with pytest.raises(ValueError, match=f"continue_final_message .*{message}"):
        _rendered({"role": "user", "content": content}, continue_final_message=True, **options)


def test_only_the_content_can_be_continued():
    with pytest.raises(NotImplementedError, match="must be True or False, got 'reasoning_content'"):
        _rendered(*TURNS, continue_final_message="reasoning_content")
    ours = _rendered(*TURNS, continue_final_message="content")
    assert ours == _rendered(*TURNS, continue_final_message=True)


def test_a_variable_that_the_template_does_not_read_is_refused():
    with pytest.raises(TypeError, match=r"'enable_thinkin', which .* not read; it reads enable_th"):
        _rendered(*CALLS, template=QWEN3, enable_thinkin=True)
    with pytest.raises(TypeError, match=r"keyword 'tools', which .* it reads add_vision_id$"):
        _rendered(*TURNS, tools=TOOLS)
    assert _rendered(*TURNS, tools=None, documents=[]) == _rendered(*TURNS)


def test_special_tokens_of_the_files(tmp_path):
    assert special_tokens(Checkpoint.at(tmp_path)) == {}
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "old", "unk_token": {"content": "<unk>", "lstrip": False}})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|im_end|>", "special": True},
                "pad_token": "<|endoftext|>",
                "bos_token": None,
                "add_bos_token": False,
                "additional_special_tokens": ["<a>", {"content": "<b>"}],
                "model_max_length": 4096,
            }
        )
    )
    assert special_tokens(Checkpoint.at(tmp_path)) == {
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<a>", "<b>"],
    }
    (tmp_path / "tokenizer_config.json").write_text(
        '{"extra_special_tokens": {"image_token": "<|image_pad|>"}}'
    )
    assert special_tokens(Checkpoint.at(tmp_path))["image_token"] == "<|image_pad|>"


def test_template_of_the_checkpoint_goes_first(tmp_path):
    assert read_template(Checkpoint.at(tmp_path)) == DEFAULT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert read_template(Checkpoint.at(tmp_path)) == "jinja"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert read_template(Checkpoint.at(tmp_path)) == "json"


def test_template_file_must_hold_a_string(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": ["a"]}')
    with pytest.raises(ValueError, match="must hold the string 'chat_template', got list"):
        read_template(Checkpoint.at(tmp_path))


def test_templates_by_name(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("first")
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    assert read_template(Checkpoint.at(tmp_path)) == "first"
    (folder / "tool_use.jinja").write_text("with tools")
    named = {"default": "first", "tool_use": "with tools"}
    assert read_template(Checkpoint.at(tmp_path)) == named
    (tmp_path / "chat_template.jinja").unlink()
    assert read_template(Checkpoint.at(tmp_path)) == {"tool_use": "with tools"}
    value = [{"name": name, "template": text} for name, text in named.items()]
    for form in (named, value):
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": form}))
        assert read_template(Checkpoint.at(tmp_path)) == named


def test_choice_among_templates():
    named = {"default": "first", "tool_use": "with tools"}
    assert choose_template("only", None) == "only"
    assert choose_template(named, None) == "first"
    assert choose_template(named, "tool_use") == "with tools"
    assert choose_template(named, "{{ 1 }}") == choose_template("only", "{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(ValueError, match="chat_template must be one of tool_use, got None"):
        choose_template({"tool_use": "with tools"}, None)
    with pytest.raises(TypeError, match="chat_template must be a name or a template, got dict"):
        choose_template("only", named)


def test_template_helpers():
    template = "{{ messages[0] | tojson }} {{ strftime_now('%Y') | length }}\n"
    template += "{% if true %}\nx\n{% endif %}\n"
    text = _rendered(user_turn(text_item("é<")), template=template)
    assert text == '{"role": "user", "content": [{"type": "text", "text": "é<"}]} 4\nx\n'


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ messages.append(1) }}",
    ],
)
def test_template_must_not_reach_into_python(template):
    with pytest.raises(ValueError, match="chat template must not reach into Python: "):
        _rendered(user_turn(text_item("Hi")), template=template)


def test_template_never_sees_the_users_objects():
    class Picture:
        def save(self):
            raise AssertionError

    seen = _rendered(
        user_turn({"type": "image", "image": Picture(), "min_pixels": 3136}),
        template="{{ messages[0].content | tojson }}",
    )
    assert seen == '[{"type": "image", "image": ""}]'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ nothing[0] }}", "'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
    ],
    ids=["syntax", "raised", "undefined", "type", "range"],
)
def test_template_that_fails(template, message):
    with pytest.raises(ValueError, match=f"chat template could not be rendered: {message}"):
        _rendered(user_turn(text_item("Hi")), template=template)
