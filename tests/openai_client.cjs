// The npm package "openai" against a server: node openai_client.cjs URL MODEL. Prints what it got as one JSON object.
const OpenAI = require("openai");

async function main(url, model) {
  const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
  const asked = { model, messages: [{ role: "user", content: "你好" }], temperature: 0, max_tokens: 12 };
  const found = {};
  const whole = await client.chat.completions.create(asked);
  found.whole = whole.choices[0].message.content;
  found.usage = whole.usage.completion_tokens;

  const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  found.streamed = "";
  for await (const chunk of stream) {
    found.streamed += chunk.choices[0]?.delta?.content ?? "";
    found.reason = chunk.choices[0]?.finish_reason ?? found.reason;
    found.streamedUsage = chunk.usage?.completion_tokens;
  }

  const left = await client.chat.completions.create({ ...asked, max_tokens: 200, stream: true });
  for await (const chunk of left) break; // hangs up

  const completion = await client.completions.create({ model, prompt: "Hello", max_tokens: 4, temperature: 0, logprobs: 1 });
  found.tokens = completion.choices[0].logprobs.tokens.length;
  found.models = (await client.models.list()).data.map((entry) => entry.id);
  try {
    await client.chat.completions.create({ ...asked, tools: [{ type: "function", function: { name: "f" } }] });
  } catch (error) {
    found.error = { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
  console.log(JSON.stringify(found));
}

main(process.argv[2], process.argv[3]);
