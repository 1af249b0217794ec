// A request of this page as a program. The key never appears: both read it from an environment variable.

const VARIABLE = "FLASHDMD_API_KEY";

const base = () => new URL("v1", document.baseURI).href;

const shellQuoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// JSON strings are Python strings too, except for the half of a surrogate pair, which no prompt may hold.
const pythonString = (text) => JSON.stringify(text);

export function curl(body, withKey) {
  const lines = [`curl ${base()}/images/generations`];
  if (withKey) lines.push(`  --header "Authorization: Bearer $${VARIABLE}"`);
  lines.push(`  --header 'Content-Type: application/json'`);
  lines.push(`  --data ${shellQuoted(JSON.stringify(body))}`);
  return lines.join(" \\\n");
}

export function python(body, withKey) {
  const key = withKey ? `os.environ["${VARIABLE}"]` : `"unused"`;
  return `import base64
${withKey ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url=${pythonString(base())}, api_key=${key})
answer = client.images.generate(
    model=${pythonString(body.model)},
    prompt=${pythonString(body.prompt)},
    n=${body.n},
    size=${pythonString(body.size)},
    extra_body={"seed": ${body.seed}, "num_inference_steps": ${body.num_inference_steps}},
)
for number, image in enumerate(answer.data):
    with open(f"image-{number}.png", "wb") as file:
        file.write(base64.b64decode(image.b64_json))
`;
}
