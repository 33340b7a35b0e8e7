// The OpenAI Node SDK, unchanged, against a running server: node openai_node.mjs BASE_URL
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// Packages are looked for in the folder that PACKAGES names, not beside this file.
const require = createRequire(`${process.env.PACKAGES}/`);
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")).href);

const model = "smollm2-135m-instruct";
const messages = [{ role: "user", content: "Name three colours." }];
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });

const request = { model, messages, max_tokens: 12, seed: 3, n: 2 };
const whole = await client.chat.completions.create({ ...request, logprobs: true, top_logprobs: 3 });
const texts = whole.choices.map((choice) => choice.message.content);
assert.equal(texts.length, 2);
assert.equal(whole.choices[1].logprobs.content[0].top_logprobs.length, 3);
assert.equal(
  whole.usage.total_tokens,
  whole.usage.prompt_tokens + whole.usage.completion_tokens,
);

const streamed = ["", ""];
let usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...request, ...options })) {
  usage = chunk.usage ?? usage;
  for (const choice of chunk.choices) streamed[choice.index] += choice.delta.content ?? "";
}
assert.deepEqual(streamed, texts);
assert.equal(usage.prompt_tokens, whole.usage.prompt_tokens);

// The SDK's own accumulator is strict about the order of chunks.
const runner = client.chat.completions.stream({ ...request, n: 1, temperature: 0 });
assert.match(await runner.finalContent(), /Red/);

const biased = await client.completions.create({
  model, prompt: "One,", max_tokens: 3, temperature: 0, logit_bias: { 19556: 100 },
});
assert.equal(biased.choices[0].text, "HelloHelloHello");

// It asks for base64 and decodes it.
const input = ["a small lamp", "a wall bracket"];
const vectors = await client.embeddings.create({ model: "all-minilm-l6-v2", input });
assert.deepEqual(vectors.data.map((item) => item.embedding.length), [384, 384]);

const names = [];
for await (const card of client.models.list()) names.push(card.id);
assert.ok(names.includes(model));

await assert.rejects(client.chat.completions.create({ ...request, n: 300 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.deepEqual([error.code, error.param], ["invalid_request", "n"]);
  return true;
});
console.log("all is well");
