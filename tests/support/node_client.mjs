// What a JavaScript program does with the server, through OpenAI's npm package. Prints one JSON object.
import { createRequire } from "node:module";

const [modules, baseURL] = process.argv.slice(2);
const { OpenAI } = createRequire(`${modules}/`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const model = "tiny";
const messages = [{ role: "user", content: "你好, please introduce yourself." }];
const asked = { model, messages, temperature: 0, max_tokens: 20 };

const whole = await client.chat.completions.create(asked);

let streamed = "";
let usage = null;
const finishes = [];
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
})) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  if (chunk.choices[0]?.finish_reason) finishes.push(chunk.choices[0].finish_reason);
  usage = chunk.usage ?? usage;
}

// hangs up after the first words
const stream = await client.chat.completions.create({ ...asked, max_tokens: 100, stream: true });
for await (const chunk of stream) if (chunk.choices[0].delta.content) break;

let refused = null;
try {
  await client.chat.completions.create({ ...asked, tools: [{ type: "function", function: { name: "f" } }] });
} catch (error) {
  refused = { status: error.status, param: error.param, type: error.type };
}
const completion = await client.completions.create({ model, prompt: "Hello", max_tokens: 5, temperature: 0 });
const models = (await client.models.list()).data.map((entry) => entry.id);
console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    streamed,
    usage,
    finishes,
    refused,
    models,
    completion: completion.usage,
  }),
);
